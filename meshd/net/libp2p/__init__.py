"""libp2p: TCP, Noise and yamux. Nothing outside of this package touches py-libp2p.

What is used of it: the Noise handshake, multistream-select and peer ids, so that any libp2p node can connect. What
is not: its host, swarm, listener and dialer. Measured on 0.8.1, one exception in a handler stops that host, it refuses
every connection after 250, blocks a peer for 60 s after one failed dial, and binds a port that another process already
has: `transport.py` does these. Nor its session and its yamux: a call there and back took 0.26 ms of CPU, and takes
0.10 (`bench/rpc.py`), bulk bytes 2.4 s a GB and 1.3; a write cancelled in a frame made garbage of the connection.
`wire.py` has the Noise messages, `muxer.py` and `stream.py` are yamux as its specification says.
"""

from meshd.net.libp2p.transport import JOIN_PROTOCOL, Libp2pTransport

__all__ = ["JOIN_PROTOCOL", "Libp2pTransport"]
