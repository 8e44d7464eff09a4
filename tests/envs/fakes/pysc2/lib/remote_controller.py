class ConnectError(Exception):
    pass
