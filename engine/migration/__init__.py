"""Configurations of other libraries: tables from their keys to those of icegrt, and the conversion that they drive."""
