"""A small Hugging Face Hub on this machine, so that the tests drive the real client without a network.

It keeps everything in memory and has two names: 127.0.0.1 is the Hub, localhost its storage for large files. The
client follows redirects that stay on the Hub. One to another host it takes for a signed address, as on the real Hub:
it reads the file's facts off the redirect and sends its token no further. Of the client's many calls those are here
that creating, filling, reading and deleting repositories need; pull requests are not.
"""

from .server import LocalHub


__all__ = ["LocalHub"]
