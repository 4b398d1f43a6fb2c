# cython: language_level=3, freethreading_compatible=False
"""The egress data plane as a Python object: a thin binding of ext/egress/engine.h, for the engine process.

The loops run in threads of their own that never take the GIL. Everything here returns at once, except `join`, which
releases it. Imports nothing, so that a frozen bundle needs no hints.
"""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memset


cdef extern from "engine.h" nogil:
    enum: T_CLASSES
    enum: M_COUNT
    enum: LATENCY_BUCKETS
    enum: B_WINDOWS
    enum: INSTANCE_MAX

    enum bound:
        pass

    struct engine_settings:
        unsigned loops
        const int *listeners
        const char *ca_certificate
        const char *ca_key
        const char *trusted
        const char *trust_extra
        unsigned leaf_cache
        unsigned max_requests
        unsigned max_mints
        uint64_t *bounds_each
        uint64_t *bounds_total
        uint64_t *clients_each
        uint64_t *clients_total
        uint16_t listen_port
        uint16_t assumed_tls_port
        unsigned *timers_ms
        unsigned n_allow
        unsigned n_deny
        const char **allow
        const char **deny

    struct engine:
        pass

    enum metric:
        pass

    engine *engine_new(const engine_settings *s, char *error, size_t error_size)
    bint engine_start(engine *e)
    void engine_accept(engine *e)
    void engine_drain(engine *e, unsigned grace_ms)
    unsigned engine_running(engine *e)
    void engine_join(engine *e)
    void engine_free(engine *e)
    int engine_set_policy(engine *e, const char *address, const char *instance, const uint8_t *data, size_t n)
    bint engine_remove(engine *e, const char *address)
    bint engine_put_site(engine *e, const char *ingress, const uint8_t *data, size_t n)
    bint engine_drop_site(engine *e, const char *ingress)
    bint engine_listen(engine *e, int fd, uint16_t port)
    void engine_unlisten(engine *e, uint16_t port)
    void engine_forget(engine *e, const char *instance)
    void engine_part(engine *e, const char *instance)
    bint engine_certify(engine *e, const char *name, const char *chain, const char *key)
    bint engine_challenge(engine *e, const char *name, const char *token, const char *proof, const char *chain,
                          const char *key)
    int engine_question_fd(engine *e)
    bint engine_question(engine *e, unsigned *loop, uint64_t *token, char *instance, char *name)
    void engine_answer(engine *e, unsigned loop, uint64_t token, unsigned n, const char **addresses)

    struct approval:
        unsigned loop
        uint64_t token
        uint16_t port
        bint tls
        char instance[64]
        char host[256]
        char method[32]
        char rule[64]
        char path[256]

    bint engine_approval(engine *e, approval *out)
    void engine_decide(engine *e, unsigned loop, uint64_t token, bint allow)
    void engine_place(engine *e, unsigned loop, uint64_t token, const char *address, bint exists)
    int engine_audit_fd(engine *e)
    size_t engine_audit_read(engine *e, char *out, size_t cap)
    uint64_t engine_metric(engine *e, metric m)
    uint64_t engine_in_use(engine *e, bound what)
    uint64_t engine_largest(engine *e, bound what, char *instance)
    uint64_t engine_limited(engine *e, bound what)
    uint64_t engine_denied(engine *e, unsigned reason)
    uint64_t engine_latency(engine *e, unsigned bucket)
    const char *engine_reason(unsigned reason)


cdef extern from "confine.h" nogil:
    bint c_confine "confine"(unsigned uid, int *locked, char *error, size_t n)


cdef extern from "probe.h" nogil:
    struct probe_origin:
        const char *tls_name
        bint explicit_proxy
        uint16_t port

    struct sites:
        pass

    sites *probe_sites()
    void probe_sites_free(sites *s)
    bint sites_put(sites *s, const char *ingress, const uint8_t *data, size_t n)
    bint sites_drop(sites *s, const char *ingress)
    bint probe_find(sites *s, const char *host, uint16_t port, char *hostname, char *target)
    int probe_forward(const char *data, size_t n, const char *client, bint tls, const char *secret, char *out,
                      size_t *out_n, char *host, const char **reason)
    int probe_head(const char *data, size_t n, const uint8_t *rules, size_t rules_n, const probe_origin *origin,
                   char *body, size_t body_n, int64_t now_s, char *out, size_t *out_n, const char **reason)
    const char *probe_access(const uint8_t *rules, size_t rules_n, const char *host, uint16_t port, const char *method,
                             const char *target, bint override, int64_t now_s, char *rule)


cdef extern from "scrub.h" nogil:
    struct text "str":
        const char *p
        uint32_t n

    struct needles:
        pass

    void needles_add(needles *s, text what, text replacement)
    size_t scrub_next(const needles *s, const char *p, size_t n, bint last, text *out)


METRICS = (
    "accepted", "unregistered", "too_many", "handshakes", "handshakes_failed", "minted", "requests", "injected",
    "denied", "passed_through", "tunnels", "upstream_opened", "upstream_reused", "upstream_failed", "verify_failed",
    "bytes_up", "bytes_down", "audit_lost", "connections", "status_2xx", "status_3xx", "status_4xx", "status_5xx",
    "clients", "clients_refused", "scrubbed",
)
assert len(METRICS) == M_COUNT

TIMERS = ("head", "handshake", "resolve", "connect", "idle_down", "idle_up", "stream", "half", "linger", "ask", "held",
          "place", "dial", "answer")
assert len(TIMERS) == T_CLASSES


BOUNDS = ("connections", "upstreams", "streams", "handshakes", "descriptors", "bytes")
assert len(BOUNDS) == B_WINDOWS


def _reasons():
    names = []
    cdef const char *name = engine_reason(0)
    while name != NULL:
        names.append((<bytes>name).decode())
        name = engine_reason(<unsigned>len(names))
    return tuple(names)


REASONS = _reasons()


def confine(unsigned uid):
    """Permanently give up what an engine process does not need, see confine.h. True if its memory is locked.

    Raises OSError; the process must end then.
    """
    cdef char error[256]
    cdef int locked = 0
    if not c_confine(uid, &locked, error, sizeof(error)):
        raise OSError((<bytes>error).decode(errors="replace"))
    return bool(locked)


def rewrite_head(bytes data, rules, bytes tls_name, bint explicit_proxy, uint16_t port, int64_t now_s=0,
                 bytearray body=None):
    """One request head as the host would get it (bytes), None if it is incomplete, or why it is refused (str).

    ``body`` is signed in place."""
    cdef const uint8_t[:] view = rules
    cdef probe_origin origin
    cdef const char *reason
    cdef bytes room = bytes(131072)
    cdef char *out = room
    cdef size_t n = 131072
    cdef char *sent = NULL
    cdef size_t sent_n = 0
    if body is not None:
        sent = body
        sent_n = <size_t>len(body)
    origin.tls_name = NULL
    if tls_name is not None:
        origin.tls_name = tls_name
    origin.explicit_proxy = explicit_proxy
    origin.port = port
    cdef int used = probe_head(data, <size_t>len(data), &view[0], <size_t>view.shape[0], &origin, sent, sent_n, now_s, out, &n,
                               &reason)
    if used == 0:
        return None
    if used < 0:
        return (<bytes>reason).decode()
    return out[:n]


def decide_access(rules, bytes host, uint16_t port, bytes method, bytes target, bint override, int64_t now_s):
    """How compiled rules decide a request: the reason and the name of the rule. Raises ValueError."""
    cdef const uint8_t[:] view = rules
    cdef char rule[64]
    cdef const char *name = host
    cdef const char *verb = method
    cdef const char *path = target
    cdef size_t n = <size_t>view.shape[0]
    cdef const uint8_t *data = &view[0]
    cdef const char *reason = probe_access(data, n, name, port, verb, path, override, now_s, rule)
    if reason == NULL:
        raise ValueError("not rules, or not a host")
    return (<bytes>reason).decode(), (<bytes>rule).decode()


cdef text text_of(bytes data):
    cdef text t
    t.p = data
    t.n = <uint32_t>len(data)
    return t


def scrub(list texts, list pieces):
    """The output for each piece of a stream, and at its end for what was kept back, as ext/egress/echo.c makes it.
    `texts`: pairs of a text and its replacement."""
    cdef text piece
    cdef bytes unsure = b""
    cdef size_t at, used
    cdef list out = []
    cdef needles *s = <needles *>calloc(1, sizeof(needles))
    if s == NULL:
        raise MemoryError
    try:
        for what, replacement in texts:
            needles_add(s, text_of(what), text_of(replacement))
        for number in range(len(pieces) + 1):
            last = number == len(pieces)
            unsure += b"" if last else pieces[number]
            given = b""
            at = 0
            while True:
                used = scrub_next(s, <const char *>unsure + at, <size_t>len(unsure) - at, last, &piece)
                if used == 0:
                    break
                given += piece.p[:piece.n]
                at += used
            unsure = unsure[at:]
            out.append(given)
        return out
    finally:
        free(s)


def forward_head(bytes data, bytes client, bint tls, bytes secret):
    """One request head by an ingress: the host name and the head for the guest, None if it is incomplete, or why it is
    refused (str). `secret`: name of the header that is not passed on."""
    cdef const char *reason
    cdef char host[256]
    cdef bytes room = bytes(131072)
    cdef char *out = room
    cdef size_t n = 131072
    cdef int used = probe_forward(data, <size_t>len(data), client, tls, secret, out, &n, host, &reason)
    if used == 0:
        return None
    if used < 0:
        return (<bytes>reason).decode()
    return (<bytes>host).decode(), out[:n]


cdef class Sites:
    """The routing table of ingresses by itself, for tests."""

    cdef sites *_s

    def __cinit__(self):
        self._s = probe_sites()
        if self._s == NULL:
            raise MemoryError()

    def __dealloc__(self):
        if self._s != NULL:
            probe_sites_free(self._s)

    def put(self, bytes ingress, routes):
        cdef const uint8_t[:] view = routes
        if not sites_put(self._s, ingress, &view[0], <size_t>view.shape[0]):
            raise ValueError("no routes")

    def drop(self, bytes ingress):
        return sites_drop(self._s, ingress)

    def find(self, bytes host, uint16_t port):
        """Host name of the rule and name of the instance; None if no rule fits."""
        cdef char hostname[256]
        cdef char target[64]
        if not probe_find(self._s, host, port, hostname, target):
            return None
        return (<bytes>hostname).decode(), (<bytes>target).decode()


def _text(data):
    """`data`, which must end with a zero byte."""
    if len(data) == 0 or data[-1] != 0:
        raise ValueError("a text that does not end with a zero byte")
    return data


cdef class Engine:
    """All loops of the data plane. `start`, `accept`, then `drain` and `join`; freed with the object."""

    cdef engine *_e
    cdef bint _started

    def __cinit__(self, list listeners, ca_certificate, ca_key, trusted, trust_extra, unsigned leaf_cache,
                  each, total, clients_each, clients_total, unsigned max_requests, unsigned max_mints,
                  uint16_t listen_port,
                  uint16_t assumed_tls_port, timers_ms, list allow, list deny):
        """The PEM texts are buffers that end with a zero byte; keys are read from where they are, not copied."""
        cdef engine_settings s
        cdef char error[256]
        cdef Py_ssize_t i
        cdef const uint8_t[:] certificate = ca_certificate, key = ca_key, roots = trusted, more = trust_extra
        bounds = (each, total, clients_each, clients_total)
        if not listeners or len(timers_ms) != T_CLASSES or any(len(every) != B_WINDOWS for every in bounds):
            raise ValueError("at least one listener, all timers and all bounds")
        for text in (ca_certificate, ca_key, trusted, trust_extra):
            _text(text)
        memset(&s, 0, sizeof(s))
        cdef int *fds = <int *>calloc(len(listeners), sizeof(int))
        cdef const char **nets = <const char **>calloc(len(allow) + len(deny) + 1, sizeof(char *))
        if fds == NULL or nets == NULL:
            free(fds)
            free(nets)
            raise MemoryError()
        try:
            for i in range(len(listeners)):
                fds[i] = listeners[i]
            for i in range(len(allow)):
                nets[i] = <bytes?>allow[i]
            for i in range(len(deny)):
                nets[len(allow) + i] = <bytes?>deny[i]
            for i in range(T_CLASSES):
                s.timers_ms[i] = timers_ms[i]
            s.loops = <unsigned>len(listeners)
            s.listeners = fds
            s.ca_certificate = <const char *>&certificate[0]
            s.ca_key = <const char *>&key[0]
            s.trusted = <const char *>&roots[0]
            s.trust_extra = <const char *>&more[0]
            s.leaf_cache = leaf_cache
            for i in range(B_WINDOWS):
                s.bounds_each[i] = each[i]
                s.bounds_total[i] = total[i]
                s.clients_each[i] = clients_each[i]
                s.clients_total[i] = clients_total[i]
            s.max_requests = max_requests
            s.max_mints = max_mints
            s.listen_port = listen_port
            s.assumed_tls_port = assumed_tls_port
            s.n_allow = <unsigned>len(allow)
            s.n_deny = <unsigned>len(deny)
            s.allow = nets
            s.deny = nets + len(allow)
            self._e = engine_new(&s, error, sizeof(error))
        finally:
            free(fds)
            free(nets)
        if self._e == NULL:
            raise ValueError((<bytes>error).decode(errors="replace"))

    def __dealloc__(self):
        if self._e != NULL:
            if self._started:
                with nogil:
                    engine_drain(self._e, 0)
                    engine_join(self._e)
            engine_free(self._e)

    def start(self):
        self._started = True
        if not engine_start(self._e):
            raise OSError("the threads of the data plane cannot be started")

    def accept(self):
        """Accepts connections, also those that were queued since the sockets listen."""
        engine_accept(self._e)

    def drain(self, unsigned grace_ms):
        engine_drain(self._e, grace_ms)

    def running(self):
        """Loops that have not ended; the end of one makes `audit_fd` readable."""
        return engine_running(self._e)

    def join(self):
        with nogil:
            engine_join(self._e)

    def set_policy(self, bytes address, bytes instance, snapshot):
        """Swaps the rules of a source address; after the return every request is decided by the new ones."""
        cdef const uint8_t[:] view = snapshot
        cdef const uint8_t *data = &view[0] if view.shape[0] else NULL
        if engine_set_policy(self._e, address, instance, data, <size_t>view.shape[0]) != 0:
            raise ValueError("not a snapshot, or not an address")

    def remove(self, bytes address):
        return engine_remove(self._e, address)

    def put_site(self, bytes ingress, routes):
        """Swaps the routes of an ingress."""
        cdef const uint8_t[:] view = routes
        cdef const uint8_t *data = &view[0] if view.shape[0] else NULL
        if not engine_put_site(self._e, ingress, data, <size_t>view.shape[0]):
            raise ValueError("no routes, or too many different patterns")

    def drop_site(self, bytes ingress):
        return engine_drop_site(self._e, ingress)

    def listen(self, int fd, uint16_t port):
        """Takes over a listening socket."""
        if not engine_listen(self._e, fd, port):
            raise MemoryError()

    def unlisten(self, uint16_t port):
        engine_unlisten(self._e, port)

    def forget(self, bytes instance):
        """The known address of an instance, or with None of all, is no longer valid."""
        cdef const char *name = NULL
        if instance is not None:
            name = instance
        engine_forget(self._e, name)

    def part(self, bytes instance):
        """An instance has ended: ends the exchanges with it."""
        engine_part(self._e, instance)

    def certify(self, bytes name, chain, key):
        """The certificate of a host name: PEM texts as in `__cinit__`, empty for none."""
        cdef const uint8_t[:] first = _text(chain), second = _text(key)
        cdef const char *pem = <const char *>&first[0] if first.shape[0] > 1 else NULL
        if not engine_certify(self._e, name, pem, <const char *>&second[0]):
            raise ValueError("no certificate with its key")

    def challenge(self, bytes name, bytes token, bytes proof, chain, key):
        """What proves to a public CA that the name is ours."""
        cdef const uint8_t[:] first = _text(chain), second = _text(key)
        if not engine_challenge(self._e, name, token, proof, <const char *>&first[0], <const char *>&second[0]):
            raise ValueError("no certificate with its key, or too long")

    def question_fd(self):
        return engine_question_fd(self._e)

    def questions(self):
        """The names to resolve, each as (loop, token, instance, name); without a name: where the instance is."""
        cdef unsigned loop
        cdef uint64_t token
        cdef char instance[64]
        cdef char name[256]
        found = []
        while engine_question(self._e, &loop, &token, instance, name):
            found.append((loop, token, (<bytes>instance).decode(), (<bytes>name).decode()))
        return found

    def answer(self, unsigned loop, uint64_t token, list addresses):
        cdef const char *texts[16]
        cdef unsigned i, n = <unsigned>min(len(addresses), 16)
        for i in range(n):
            texts[i] = <bytes?>addresses[i]
        engine_answer(self._e, loop, token, n, texts)

    def approvals(self):
        """Requests to approve, each as (loop, token, instance, tls, host, port, method, path, rule)."""
        cdef approval a
        found = []
        while engine_approval(self._e, &a):
            texts = [(<bytes>text).decode("latin-1") for text in (a.instance, a.host, a.method, a.path, a.rule)]
            instance, host, method, path, rule = texts
            found.append((a.loop, a.token, instance, bool(a.tls), host, a.port, method, path, rule))
        return found

    def decide(self, unsigned loop, uint64_t token, bint allow):
        engine_decide(self._e, loop, token, allow)

    def place(self, unsigned loop, uint64_t token, bytes address, bint exists):
        """`address` is empty if the instance cannot take requests."""
        engine_place(self._e, loop, token, address, exists)

    def audit_fd(self):
        return engine_audit_fd(self._e)

    def audit(self):
        """Whole records since the last call, as bytes (layout: audit.c), at most 64 KB; empty when there are no more."""
        cdef bytes room = bytes(65536)
        cdef char *out = room
        return room[:engine_audit_read(self._e, out, 65536)]

    def metrics(self):
        cdef unsigned i
        return {name: engine_metric(self._e, <metric>i) for i, name in enumerate(METRICS)}

    def in_use(self):
        """What is held at once, by bound."""
        cdef unsigned i
        return {name: engine_in_use(self._e, <bound>i) for i, name in enumerate(BOUNDS)}

    def largest(self):
        """The instance that holds the most, by bound, and how much that is; a bound of which nobody holds any is
        omitted."""
        cdef unsigned i
        cdef char instance[INSTANCE_MAX]
        found = {}
        for i, name in enumerate(BOUNDS):
            used = engine_largest(self._e, <bound>i, instance)
            if used:
                found[name] = (instance.decode(), used)
        return found

    def limited(self):
        """How often something was refused because of a bound."""
        cdef unsigned i
        return {name: engine_limited(self._e, <bound>i) for i, name in enumerate(BOUNDS)}

    def denied(self):
        return {name: engine_denied(self._e, <unsigned>i) for i, name in enumerate(REASONS) if i}

    def latency(self):
        """Requests by time taken: bucket i counts those below 16 µs · 2^i."""
        return [engine_latency(self._e, <unsigned>i) for i in range(LATENCY_BUCKETS)]
