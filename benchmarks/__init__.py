"""One script a headline number: each prints JSON lines and a table, with its baseline in the same run."""
