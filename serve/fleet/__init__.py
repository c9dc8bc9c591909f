"""Several servers behind one HAProxy: its configuration, which replica an adapter belongs to, and the processes."""
