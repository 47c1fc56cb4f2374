"""Wire ↔ types: the one place that knows generated code, and where every bound of a field is enforced."""

from covey.codec.messages import decode as decode
from covey.codec.messages import encode as encode
