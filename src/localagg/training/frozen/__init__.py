"""Training on a frozen backbone: its cached features, and the part that is trained."""
