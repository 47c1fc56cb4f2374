"""Programs: graphs of calls over semantic variables."""
