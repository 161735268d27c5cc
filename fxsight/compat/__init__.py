"""Code written for other tools, run by fxsight."""
