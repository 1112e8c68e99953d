"""Published figures, cost tables and token traces, without a study."""
