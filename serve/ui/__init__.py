"""The chat page: static files that the API process serves at /ui, and the votes that the page sends."""
