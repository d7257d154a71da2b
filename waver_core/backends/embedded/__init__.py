"""Real algorithms that need no weights, no GPU and no network: the default profile."""
