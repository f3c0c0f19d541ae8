"""From a configuration to a plan: plain data that says what is read and written."""
