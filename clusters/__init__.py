"""Where a search runs: this machine (`local`), and later Ray clusters elsewhere."""
