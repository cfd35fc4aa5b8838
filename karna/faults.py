"""What is wrong with a Redis: each fault in one line that names the mend.

Pure; knows the redis package's errors by name, as it may not be installed. Used by backplane.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from karna.errors import explain
from karna.text import one_line

# Where the names of an error's types and its text hold this, it is said so; `{}` is what the
# pattern caught. The first that fits.
_FAULTS = tuple((re.compile(pattern), sentence) for pattern, sentence in (
    ("Authentication required",
     "wants a password: redis://user:password@host"),
    ("without any password configured",
     "has no password set: take the one in the URL away"),
    ("AuthenticationError|AuthenticationWrongNumber|WRONGPASS",
     "refuses user and password: check them in the URL"),
    ("NoPermissionError|NOPERM",
     "does not allow this user what is needed: "
     "ACL SETUSER <name> ~karna:broadcasts +xadd +xread +xrange +xrevrange"),
    ("OutOfMemoryError|OOM command",
     "is out of memory: raise its maxmemory"),
    ("ReadOnlyError|READONLY|previous master is now a slave",
     "is a read-only replica: name its primary, or its Sentinels by redis+sentinel://"),
    ("MISCONF",
     "can't write to its disk, and takes nothing until it can: see its log"),
    (r"MovedError: \d+ (\S+)",
     "is one of a cluster, where another has the stream: name {} in the URL"),
    ("ClusterDownError|CLUSTERDOWN|MasterDownError",
     "is one of a cluster that is down: see its CLUSTER INFO"),
    ("unknown command .SENTINEL",
     "is no Sentinel: a Redis itself is named by redis://"),
    ("unknown command",
     "is no Redis of version 6.2 or later; a Sentinel is named by redis+sentinel://host:26379/name"),
    ("MasterNotFoundError",
     "is down, or unknown to each Sentinel that answers: check their hosts, and the name after /"),
    ("WRONGTYPE",
     "has something else under the name karna:broadcasts: delete that, or use another database"),
    ("exhausted the last possible ID",
     "has a stream that can't go on: DEL karna:broadcasts"),
    ("DB index is out of range|Invalid Database",
     "has no such database: check the number after the last /"),
    ("BusyLoadingError|LOADING",
     "is loading its data: wait"),
    ("max number of clients reached",
     "has too many clients: raise its maxclients"),
    ("gaierror",
     "can't be found: there is no host of this name"),
    ("CERTIFICATE_VERIFY_FAILED",
     "has a certificate that is not trusted: ?ssl_ca_certs=FILE in the URL"),
    ("SSLError|WRONG_VERSION_NUMBER",
     "speaks no TLS here: redis:// instead of rediss://"),
    ("ConnectionRefusedError|FileNotFoundError",
     "is away: nothing listens there"),
    ("InvalidResponse|Protocol Error",
     "is no Redis: something else listens there"),
    ("TimeoutError: Timeout connecting to server",
     "does not answer; where it speaks no TLS, redis:// instead of rediss://"),
    ("TimeoutError",
     "does not answer in time"),
    ("ConnectionResetError|Connection (?:closed|lost|reset)",
     "has closed the connection: it is going away, or wants TLS (rediss://)"),
))  # fmt: skip


def describe_fault(error: BaseException) -> str:
    """What goes on after "Redis at HOST ..."."""
    text = " ".join(_texts(error))
    for pattern, sentence in _FAULTS:
        found = pattern.search(text)
        if found:
            return sentence.format(*map(one_line, found.groups()))
    return f"is away: {one_line(explain(error))}"


def _texts(error: BaseException | None) -> Iterator[str]:
    """What an error and those that it came from say, with the names of their types."""
    for _ in range(3):
        if error is None:
            return
        names = [each.__name__ for each in type(error).__mro__[:2]]
        yield f"{' '.join(reversed(names))}: {one_line(explain(error))}"
        error = error.__cause__ or error.__context__
