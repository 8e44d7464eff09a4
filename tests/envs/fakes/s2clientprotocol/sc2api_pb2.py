"""Stands for messages generated long ago, by which old ones are told: _descriptor.FieldDescriptor("""

import os
import sys

if "google.protobuf" in sys.modules and os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") != "python":
    raise AssertionError("protobuf was imported before the choice of its implementation")
if os.environ.get("PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION") != "python":
    raise TypeError("Descriptors cannot be created directly")
