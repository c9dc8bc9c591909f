"""The CPU path of training: everything here can be deleted as a whole."""
