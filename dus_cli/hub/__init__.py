"""The Hub, read: ids to commits, small files, headers and weights, by range request."""
