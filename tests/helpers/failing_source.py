"""A source some of whose images fail when they are read, after the header scan."""

import os
import signal


class FailingSource:
    """Images ``bad`` are damaged bytes, raise ``error``, or kill the process that reads them."""

    def __init__(self, source, bad, *, error=None, kill=False):
        self.source, self.bad, self.error, self.kill = source, set(bad), error, kill
        self.read = []

    def __getattr__(self, name):
        return getattr(self.__dict__["source"], name)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.read.append(index)
        if index not in self.bad:
            return self.source[index]
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.error is not None:
            raise self.error
        return self.source[index]._replace(image=b"damaged since")
