"""The CPU path of the server: everything here can be deleted as a whole."""
