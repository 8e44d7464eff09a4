class ConnectionError(Exception):
    pass
