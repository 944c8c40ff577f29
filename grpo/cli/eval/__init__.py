"""The commands `rankup eval` and `rankup compare`."""
