"""Triton device code and the custom operators that launch it. Importing this package does not import Triton: its modules do."""
