"""HTTP/1.1 as bytes: heads, bodies, non-blocking sockets, and which of them are ready.

Knows framing and buffers. It knows no model, no server's state, no retry and no error of ours.
Bytes of a body stay untouched.
May import: errors, orjson, and the standard library.
"""
