"""What all commands share: errors, flags, files, base models, the adapter store and the client."""
