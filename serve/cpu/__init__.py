"""The server's CPU path. The whole folder can be deleted: UPSTREAM.md explains how, and when."""
