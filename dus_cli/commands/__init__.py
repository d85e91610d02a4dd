"""The command line of each verb: parse, call, print."""
