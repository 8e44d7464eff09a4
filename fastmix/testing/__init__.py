"""Tools for tests and measurements, installed with the package so that users can check it on their own machine."""
