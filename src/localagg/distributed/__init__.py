"""The processes of a job: how they start, talk and end."""
