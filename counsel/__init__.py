"""What all parts share: errors, flags, files, base models, the adapter store and the client."""
