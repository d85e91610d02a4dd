"""Layer maps, and how configs and tensor names follow them. Pure functions: no file is opened."""
