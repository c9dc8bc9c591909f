"""The server's CPU path. The folder can be deleted as a whole: UPSTREAM.md says how, and when."""
