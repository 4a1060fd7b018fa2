"""The report of a run: what is read, what is counted from it, and the page that shows it."""
