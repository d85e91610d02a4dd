"""Read from the Hub: resolve ids to commits, fetch files, headers and weights by range request."""
