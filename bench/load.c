/* Load for the bench: many clients in one process and one thread, over epoll.
 *
 *   load --port 8000 --clients 64 --inflight 16            request and answer, closed loop
 *   load --port 8000 --clients 64 --http 1                 the same by POST over kept connections
 *   load --port 8000 --clients 64 --line 'echo hello'      the same line again and again
 *   load --port 8000 --clients 64 --sessions 1             connect, one request, close; again
 *   load --port 8000 --listeners 1000 --publish 8          broadcasts, 8 in flight
 *   load --port 8000 --clients 1 --every-us 1000 --listeners 1000 --publish-every-us 20000 --slow 8
 *   load --port 8000 --handshakes 1000 --inflight 64       opening handshakes
 *   load --port 8000 --listeners 2000 --hold 1             connect, print a line, stay until stdin ends
 *
 * Prints one JSON object and ends with 0; any wrong, missing, doubled or error answer, or a lost
 * connection, ends with 1 and one line on stderr. Every request has a number of its own, which is
 * its id and stands in its command line too (10000000 in --line), so that no line is asked twice
 * until 40 million have been. The answer must bring back an id that is outstanding, and the text
 * that belongs to it (--answer, in which 20000000 is twice the number). By POST there is no id:
 * answers come in order. Every broadcast carries a number, and each client must see each number
 * once and in order.
 *
 * Requests are masked once: only the eight digits of a number are changed for each request. So one
 * core drives about a million requests a second, and "load_cpu" says how busy that core was.
 *
 * Sections: options, time and histogram, clients and buffers, frames, requests, broadcasts, answers,
 * opening and closing, event loop, reports, main.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

static void fail(const char *format, ...) {
    va_list values;
    va_start(values, format);
    fprintf(stderr, "load: ");
    vfprintf(stderr, format, values);
    fprintf(stderr, "\n");
    exit(1);
}

/* ---- options ---------------------------------------------------------------------------------- */

static struct {
    long port, socketio;            /* socketio: 1 = Socket.IO door, 0 = raw door */
    long clients, inflight;         /* clients that request, requests in flight of each */
    long size, fragments;           /* bytes of a request's JSON, frames it is cut into */
    long attachments, attachment_bytes; /* binary frames behind each Socket.IO request */
    long drip_us;                   /* > 0: one byte a write, this long after the one before */
    long every_us;                  /* > 0: requests on a schedule instead of a closed loop */
    long listeners;                 /* clients that only listen */
    long publish, publish_every_us; /* broadcasts in flight, or on a schedule */
    long slow;                      /* clients with a long `countdown` running */
    long handshakes, hold;
    long milliseconds, warmup_ms;
    long pid;                       /* the server's, to read its processor time */
    long status;                    /* 1: get_status instead of a command line */
    long http;                      /* 1: POST over kept connections instead of a WebSocket */
    long sessions;                  /* 1: each request has a connection of its own */
    const char *line, *answer;      /* what is asked, what must be in its answer; 10000000 counts */
    const char *path;               /* of a POST */
} opt = {.inflight = 1, .fragments = 1, .milliseconds = 1000, .warmup_ms = 300,
         .line = "echo w10000000 w10000000", .path = "/api/execute_command"};

static const struct { const char *name; long *value; } OPTIONS[] = {
    {"--port", &opt.port}, {"--socketio", &opt.socketio}, {"--clients", &opt.clients},
    {"--inflight", &opt.inflight}, {"--size", &opt.size}, {"--fragments", &opt.fragments},
    {"--drip-us", &opt.drip_us}, {"--every-us", &opt.every_us}, {"--listeners", &opt.listeners},
    {"--publish", &opt.publish}, {"--publish-every-us", &opt.publish_every_us},
    {"--slow", &opt.slow}, {"--handshakes", &opt.handshakes}, {"--hold", &opt.hold},
    {"--milliseconds", &opt.milliseconds}, {"--warmup-ms", &opt.warmup_ms}, {"--pid", &opt.pid},
    {"--status", &opt.status}, {"--attachments", &opt.attachments},
    {"--attachment-bytes", &opt.attachment_bytes}, {"--http", &opt.http}, {"--sessions", &opt.sessions},
};
static const struct { const char *name, **value; } TEXTS[] = {
    {"--line", &opt.line}, {"--answer", &opt.answer}, {"--path", &opt.path},
};

#define COUNT(table) (sizeof(table) / sizeof *(table))

static bool set_option(const char *name, const char *value) {
    for (size_t k = 0; k < COUNT(OPTIONS); k++)
        if (strcmp(name, OPTIONS[k].name) == 0) { *OPTIONS[k].value = atol(value); return true; }
    for (size_t k = 0; k < COUNT(TEXTS); k++)
        if (strcmp(name, TEXTS[k].name) == 0) { *TEXTS[k].value = value; return true; }
    return false;
}

static void parse_options(int argc, char **argv) {
    for (int i = 1; i < argc; i += 2) {
        if (i + 1 < argc && set_option(argv[i], argv[i + 1])) continue;
        fprintf(stderr, "load: what is %s?\n", argv[i]);
        exit(2);
    }
    if (opt.every_us && opt.inflight < 256) opt.inflight = 256;  /* room for late answers */
    if (opt.every_us && opt.http) fail("--every-us needs ids, which a POST has not");
    if (opt.fragments > 1) opt.line = "echo hello";  /* a number must not be cut by a frame's end */
    if (opt.status) opt.line = NULL;
}

/* ---- time and histogram ----------------------------------------------------------------------- */

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t) != 0) return 0;
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now_ns(void) { return clock_ns(CLOCK_MONOTONIC); }

static uint64_t server_cpu_ns(void) {
    clockid_t clock;
    if (!opt.pid || clock_getcpuclockid((pid_t)opt.pid, &clock) != 0) return 0;
    return clock_ns(clock);
}

/* 32 buckets for each power of two: an error of at most 3 %. */
enum { SUB_BITS = 5, SUB = 1 << SUB_BITS, BUCKETS = 64 * SUB };
typedef struct { uint64_t count[BUCKETS], total, max; } Histogram;

static void record(Histogram *h, uint64_t ns) {
    int shift = ns < SUB ? 0 : 63 - __builtin_clzll(ns) - SUB_BITS;
    h->count[shift * SUB + (int)(ns >> shift)]++;
    h->total++;
    if (ns > h->max) h->max = ns;
}

static double percentile_us(const Histogram *h, double share) {
    uint64_t want = (uint64_t)(share * (double)h->total), seen = 0;
    for (int i = 0; i < BUCKETS && h->total; i++) {
        seen += h->count[i];
        if (seen > want) {
            int shift = i < 2 * SUB ? 0 : i / SUB - 1;
            double low = (double)((uint64_t)(i - shift * SUB) << shift);
            return (low + (double)(1ull << shift) / 2) / 1000;
        }
    }
    return (double)h->max / 1000;
}

/* ---- clients and buffers ---------------------------------------------------------------------- */

typedef struct { uint8_t *data; size_t len, cap; } Buffer;
typedef struct { uint32_t id; uint64_t since_ns; } Slot;  /* id 0: nothing outstanding */
typedef enum { REQUESTS, LISTENS, PUBLISHES, SLOW } Role;
typedef enum { CONNECTING, UPGRADING, SESSION, NAMESPACE, OPEN, GONE } State;

typedef struct {
    int fd;
    Role role;
    State state;
    bool waits_for_room, closing;
    bool said_goodbye;       /* the server has answered our close frame */
    bool heard;              /* a broadcast, so that next_tick is known */
    uint32_t oldest;         /* the slot that a POST's answer belongs to */
    uint32_t next_tick;      /* the broadcast it must see next */
    uint64_t since_ns;       /* start of its connect */
    Buffer in, out;          /* what one read or write left over */
    Slot *slots;
} Client;

static Client *clients;
static int client_count, epoll_fd;
static Client *publisher;

static void need(Buffer *b, size_t more) {
    if (b->len + more <= b->cap) return;
    b->cap = (b->len + more) * 2;
    b->data = realloc(b->data, b->cap);
    if (!b->data) fail("out of memory");
}

static void append(Buffer *b, const void *bytes, size_t count) {
    need(b, count);
    memcpy(b->data + b->len, bytes, count);
    b->len += count;
}

static void watch(Client *c, uint32_t events) {
    struct epoll_event event = {.events = events, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_MOD, c->fd, &event);
}

static void drip(Client *c) {
    for (size_t i = 0; i < c->out.len; i++) {
        if (send(c->fd, c->out.data + i, 1, MSG_NOSIGNAL) != 1) fail("a one-byte write failed");
        uint64_t until = now_ns() + (uint64_t)opt.drip_us * 1000;
        while (now_ns() < until) {}
    }
    c->out.len = 0;
}

static void flush(Client *c) {
    if (!c->out.len || c->state == GONE) return;
    if (opt.drip_us && c->state == OPEN) { drip(c); return; }
    ssize_t sent = send(c->fd, c->out.data, c->out.len, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
        if (c->closing) return;
        fail("send: %s", strerror(errno));
    }
    if (sent > 0) {
        memmove(c->out.data, c->out.data + sent, c->out.len - (size_t)sent);
        c->out.len -= (size_t)sent;
    }
    if ((c->out.len > 0) != c->waits_for_room) {
        c->waits_for_room = c->out.len > 0;
        watch(c, EPOLLIN | (c->waits_for_room ? EPOLLOUT : 0u));
    }
}

/* ---- frames ----------------------------------------------------------------------------------- */

enum { CONTINUATION = 0, TEXT = 1, BINARY = 2, CLOSE = 8, PING = 9, PONG = 10 };
static const uint8_t MASK[4] = {0x37, 0xfa, 0x21, 0x3d}, NO_MASK[4];

static void append_frame(Buffer *b, int opcode, bool final, const char *payload, size_t len) {
    uint8_t head[14] = {(uint8_t)((final ? 0x80 : 0) | opcode)};
    size_t n = 2;
    if (len < 126) head[1] = (uint8_t)(0x80 | len);
    else if (len < 65536) { head[1] = 0x80 | 126; head[2] = (uint8_t)(len >> 8); head[3] = (uint8_t)len; n = 4; }
    else { head[1] = 0x80 | 127; for (int i = 0; i < 8; i++) head[2 + i] = (uint8_t)((uint64_t)len >> (56 - 8 * i)); n = 10; }
    memcpy(head + n, MASK, 4);
    append(b, head, n + 4);
    need(b, len);
    for (size_t i = 0; i < len; i++) b->data[b->len++] = (uint8_t)payload[i] ^ MASK[i & 3];
}

/* Takes one unmasked frame off `bytes`; returns its whole length, or 0 if it is not all there. */
static size_t take_frame(const uint8_t *bytes, size_t have, int *opcode, const char **payload, size_t *len) {
    if (have < 2) return 0;
    size_t head = 2, size = bytes[1] & 0x7f;
    if (bytes[1] & 0x80) fail("the server masked a frame");
    if (!(bytes[0] & 0x80)) fail("the server fragmented a message");
    if (size == 126) {
        if (have < 4) return 0;
        size = (size_t)bytes[2] << 8 | bytes[3];
        head = 4;
    } else if (size == 127) {
        if (have < 10) return 0;
        size = 0;
        for (int i = 2; i < 10; i++) size = size << 8 | bytes[i];
        head = 10;
    }
    if (have < head + size) return 0;
    *opcode = bytes[0] & 15;
    *payload = (const char *)bytes + head;
    *len = size;
    return head + size;
}

/* ---- requests --------------------------------------------------------------------------------- */

enum { FIRST_ID = 10000000, LAST_ID = 49999999, DIGITS = 8 };  /* twice of it has 8 digits, too */
enum { NUMBERS = 8 };

/* Bytes and where the numbers stand in them, so that sending is a copy and a few digits. */
typedef struct {
    Buffer bytes;
    const uint8_t *mask;
    struct { size_t at; uint32_t times; int phase; } number[NUMBERS];
    int numbers;
} Template;
static Template request_template, publish_template, answer_template;

static void find_numbers(Template *t, const char *text, const char *marker, uint32_t times, size_t head) {
    for (const char *p = text; (p = strstr(p, marker)); p += DIGITS) {
        if (t->numbers == NUMBERS) fail("more than %d numbers in %s", NUMBERS, text);
        t->number[t->numbers].at = head + (size_t)(p - text);
        t->number[t->numbers].phase = (int)(p - text) & 3;
        t->number[t->numbers++].times = times;
    }
}

static Template make_plain(const char *text) {
    Template t = {.mask = NO_MASK};
    append(&t.bytes, text, strlen(text));
    find_numbers(&t, text, "10000000", 1, 0);
    find_numbers(&t, text, "20000000", 2, 0);
    return t;
}

static char *format(const char *pattern, ...) {
    char *text;
    va_list values;
    va_start(values, pattern);
    if (vasprintf(&text, pattern, values) < 0) abort();
    va_end(values);
    return text;
}

/* The event `rpc`, asking for an ack; attachments are further arguments of it. */
static char *make_event(const char *json) {
    char *kind = opt.attachments ? format("5%ld-", opt.attachments) : format("2");
    char *text = format("4%s/ws,%d[\"rpc\",%s", kind, FIRST_ID, json);
    for (long k = 0; k < opt.attachments; k++)
        text = format("%s,{\"_placeholder\":true,\"num\":%ld}", text, k);
    return format("%s]", text);
}

/* The id comes first: so it is never cut by fragmentation. */
static char *make_json(const char *line) {
    if (!line) return format("{\"id\":%d,\"method\":\"get_status\"}", FIRST_ID);
    return format("{\"id\":%d,\"method\":\"execute_command\",\"params\":{\"command\":\"%s\"}}", FIRST_ID, line);
}

/* The line, longer by x's until its request has `size` bytes. */
static const char *make_longer(const char *line, long size) {
    long more = line ? size - (long)strlen(make_json(line)) : 0;
    if (more <= 0) return line;
    char *longer = format("%s%*s", line, (int)more, "");
    memset(longer + strlen(line), 'x', (size_t)more);
    return longer;
}

static void append_attachment(Buffer *b) {
    char *bytes = calloc(1, (size_t)opt.attachment_bytes + 1);
    append_frame(b, BINARY, true, bytes, (size_t)opt.attachment_bytes);
    free(bytes);
}

static Template make_frames(const char *line, long fragments) {
    Template t = {.mask = MASK};
    char *text = make_json(line);
    if (opt.socketio) text = make_event(text);
    size_t len = strlen(text), step = (len + (size_t)fragments - 1) / (size_t)fragments;
    for (size_t from = 0; from < len; from += step) {
        size_t count = len - from < step ? len - from : step;
        append_frame(&t.bytes, from ? CONTINUATION : TEXT, from + count == len, text + from, count);
    }
    size_t first = len < step ? len : step;
    find_numbers(&t, text, "10000000", 1, first < 126 ? 6 : first < 65536 ? 8 : 14);
    for (long k = 0; k < opt.attachments; k++) append_attachment(&t.bytes);
    return t;
}

static Template make_post(const char *line) {
    char *body = format("{\"command\":\"%s\"}", line);
    return make_plain(format("POST %s HTTP/1.1\r\nHost: 127.0.0.1:%ld\r\nContent-Type: application/json\r\n"
                             "Content-Length: %zu\r\n\r\n%s", opt.path, opt.port, strlen(body), body));
}

/* What is asked, and what must be in the answer: of `echo`, the line and what follows the name. */
static void make_request(void) {
    const char *line = make_longer(opt.line, opt.size), *answer = opt.answer;
    if (!answer && line && memcmp(line, "echo ", 5) == 0)
        answer = format("\"command\":\"%s\",\"result\":\"%s\"", line, line + 5);
    request_template = opt.http ? make_post(line) : make_frames(line, opt.fragments);
    if (answer) answer_template = make_plain(answer);
}

static void append_request(Buffer *out, const Template *t, uint32_t number) {
    append(out, t->bytes.data, t->bytes.len);
    uint8_t *bytes = out->data + out->len - t->bytes.len;
    for (int n = 0; n < t->numbers; n++) {
        uint8_t *digits = bytes + t->number[n].at;
        uint32_t value = number * t->number[n].times;
        for (int i = DIGITS - 1; i >= 0; i--, value /= 10)
            digits[i] = (uint8_t)('0' + value % 10) ^ t->mask[(t->number[n].phase + i) & 3];
    }
}

static bool stopping;      /* the time is over: nothing new is sent, answers are awaited */
static long outstanding;   /* requests without an answer */
static struct { uint64_t requests, sessions, deliveries, broadcasts, late, bytes_in; } count;
static Histogram latency, flush_time;

/* The numbers of all clients differ: FIRST_ID + turn * inflight + slot. */
static void request(Client *c, uint32_t slot, uint64_t since_ns) {
    static uint32_t turn;
    uint32_t inflight = (uint32_t)opt.inflight, turns = (LAST_ID - FIRST_ID) / inflight;
    uint32_t id = FIRST_ID + turn++ % turns * inflight + slot;
    c->slots[slot] = (Slot){id, since_ns};
    append_request(&c->out, &request_template, id);
    outstanding++;
}

/* ---- broadcasts ------------------------------------------------------------------------------- */

enum { TICKS = 4096 };  /* broadcasts that may be under way */
static uint32_t ticks_sent, ticks_done;
static struct { uint32_t seen; uint64_t since_ns; } ticks[TICKS];

static void publish(uint64_t since_ns) {
    if (ticks_sent - ticks_done == TICKS) { count.late++; return; }
    ticks[ticks_sent % TICKS].seen = 0;
    ticks[ticks_sent % TICKS].since_ns = since_ns;
    append_request(&publisher->out, &publish_template, FIRST_ID + ticks_sent++);
}

static void handle_tick(Client *c, const char *payload, size_t len, uint64_t now) {
    const char *at = memmem(payload, len, "tick-", 5);
    if (!at || at + 5 + DIGITS > payload + len) fail("a broadcast without its number: %.*s", (int)len, payload);
    uint32_t tick = 0;
    for (int i = 0; i < DIGITS; i++) tick = tick * 10 + (uint32_t)(at[5 + i] - '0');
    tick -= FIRST_ID;
    if (!publisher && !c->heard) c->next_tick = tick;  /* another load's: it may have begun long ago */
    if (tick != c->next_tick) fail("a client saw broadcast %u, expected %u", tick, c->next_tick);
    c->heard = true;
    c->next_tick++;
    count.deliveries++;
    if (!publisher) return;
    if (++ticks[tick % TICKS].seen < (uint32_t)client_count) return;
    record(&flush_time, now - ticks[tick % TICKS].since_ns);
    ticks_done++;
    count.broadcasts++;
    if (opt.publish && !stopping) { publish(now); flush(publisher); }
}

/* ---- answers ---------------------------------------------------------------------------------- */

static uint32_t number_at(const char *p, const char *end) {
    uint32_t value = 0;
    for (; p < end && *p >= '0' && *p <= '9'; p++) value = value * 10 + (uint32_t)(*p - '0');
    return value;
}

/* The id of an envelope, which stands near its end: the search goes backwards. */
static uint32_t envelope_id(const char *json, size_t len) {
    for (const char *p = json + len - 5; p >= json; p--)
        if (*p == '"' && memcmp(p, "\"id\":", 5) == 0) return number_at(p + 5, json + len);
    return 0;
}

/* The text that belongs to this request, at the place where it was the last time or elsewhere. */
static void check_text(const char *json, size_t len, uint32_t id) {
    static Buffer wanted;
    static size_t at;
    if (!answer_template.bytes.len) return;
    wanted.len = 0;
    append_request(&wanted, &answer_template, id);
    if (at + wanted.len <= len && memcmp(json + at, wanted.data, wanted.len) == 0) return;
    const char *found = memmem(json, len, wanted.data, wanted.len);
    if (!found)
        fail("%.*s is not in the answer %.*s", (int)wanted.len, wanted.data, (int)(len < 300 ? len : 300), json);
    at = (size_t)(found - json);
}

static void say_goodbye(Client *c);

static void handle_answer(Client *c, uint32_t id, const char *json, size_t len, uint64_t now) {
    if (c->role != REQUESTS) return;  /* the publisher's own answers: broadcasts are what counts */
    Slot *slot = &c->slots[opt.http ? c->oldest : (id - FIRST_ID) % (uint32_t)opt.inflight];
    if (opt.http) { id = slot->id; c->oldest = (c->oldest + 1) % (uint32_t)opt.inflight; }
    if (!id || slot->id != id) fail("an answer with id %u, which is not outstanding", id);
    check_text(json, len, id);
    record(&latency, now - slot->since_ns);
    slot->id = 0;
    outstanding--;
    count.requests++;
    if (opt.sessions) say_goodbye(c);
    else if (!stopping && !opt.every_us) request(c, (uint32_t)(slot - c->slots), now);
}

static void handle_envelope(Client *c, const char *json, size_t len, uint32_t id, uint64_t now) {
    const char *type = memmem(json, len < 256 ? len : 256, "\"type\":\"", 8);
    if (!type || type + 12 > json + len) fail("no envelope: %.*s", (int)(len < 300 ? len : 300), json);
    type += 8;
    if (memcmp(type, "noti", 4) == 0) handle_tick(c, json, len, now);
    else if (memcmp(type, "command_p", 9) == 0) return;
    else if (memcmp(type, "error", 5) == 0) fail("an error answer: %.*s", (int)(len < 300 ? len : 300), json);
    else {
        if (!id && !opt.http) id = envelope_id(json, len);
        /* A status without an id is a broadcast of a service that changed its state. */
        if (id || memcmp(type, "stat", 4) != 0) handle_answer(c, id, json, len, now);
    }
}

static void handle_packet(Client *c, const char *text, size_t len, uint64_t now) {
    if (len >= 1 && text[0] == '2') { append_frame(&c->out, TEXT, true, "3", 1); return; }
    const char *comma = len > 6 ? memchr(text, ',', 6) : NULL;
    const char *json = comma ? memchr(comma, '[', 20) : NULL;
    if (!json || (memcmp(text, "42", 2) != 0 && memcmp(text, "43", 2) != 0))
        fail("an unexpected packet: %.*s", (int)(len < 300 ? len : 300), text);
    handle_envelope(c, json, len - (size_t)(json - text), text[1] == '3' ? number_at(comma + 1, json) : 0, now);
}

static size_t content_length(const char *head, const char *end) {
    static const char NAME[] = "content-length:";
    for (const char *line = head; line < end; line++) {
        if (strncasecmp(line, NAME, sizeof NAME - 1) == 0) return strtoul(line + sizeof NAME - 1, NULL, 10);
        if (!(line = memchr(line, '\n', (size_t)(end - line)))) break;
    }
    fail("an answer without Content-Length: %.*s", (int)(end - head), head);
    return 0;
}

/* Takes one HTTP answer off `bytes`; returns its whole length, or 0 if it is not all there. */
static size_t take_http(Client *c, const char *bytes, size_t have, uint64_t now) {
    const char *end = memmem(bytes, have, "\r\n\r\n", 4);
    if (!end) return 0;
    if (memcmp(bytes, "HTTP/1.1 200", 12) != 0) fail("an error answer: %.*s", (int)(have < 300 ? have : 300), bytes);
    size_t head = (size_t)(end + 4 - bytes), len = content_length(bytes, end);
    if (have < head + len) return 0;
    handle_envelope(c, bytes + head, len, 0, now);
    return head + len;
}

/* ---- opening and closing ---------------------------------------------------------------------- */

enum { CONNECTS_AT_ONCE = 64 };  /* asyncio listens with a backlog of 100 */
enum { SETTLE_NS = 200000000 };
static const char KEY[] = "dGhlIHNhbXBsZSBub25jZQ==", ACCEPT[] = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=";
static int started, opened, gone;
static Histogram open_time;

static void start_connect(Client *c) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)opt.port),
                                  .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int one = 1;
    c->state = CONNECTING;
    c->since_ns = now_ns();
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (c->fd < 0) fail("socket: %s", strerror(errno));
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (connect(c->fd, (struct sockaddr *)&address, sizeof address) != 0 && errno != EINPROGRESS)
        fail("connect: %s", strerror(errno));
    struct epoll_event event = {.events = EPOLLIN | EPOLLOUT, .data.ptr = c};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, c->fd, &event);
    started++;
}

static void send_upgrade(Client *c) {
    char head[512];
    int n = snprintf(head, sizeof head,
                     "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%ld\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                     "Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\n\r\n",
                     opt.socketio ? "/socket.io/?EIO=4&transport=websocket" : "/ws", opt.port, KEY);
    c->state = UPGRADING;
    watch(c, EPOLLIN);
    append(&c->out, head, (size_t)n);
    flush(c);
}

static void become_open(Client *c) {
    c->state = OPEN;
    opened++;
    record(&open_time, now_ns() - c->since_ns);
    if (opt.sessions) request(c, 0, c->since_ns);
    else if (started < client_count) start_connect(&clients[started]);
}

static void handle_connected(Client *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) fail("connect: %s", strerror(error));
    if (!opt.http) { send_upgrade(c); return; }
    watch(c, EPOLLIN);
    become_open(c);
}

/* Returns how many bytes of the answer's head were taken. */
static size_t handle_upgrade(Client *c, const char *bytes, size_t have) {
    const char *end = memmem(bytes, have, "\r\n\r\n", 4);
    if (!end) return 0;
    if (memcmp(bytes, "HTTP/1.1 101", 12) != 0 || !memmem(bytes, have, ACCEPT, sizeof ACCEPT - 1))
        fail("the upgrade was refused: %.*s", (int)(end - bytes), bytes);
    if (opt.socketio) c->state = SESSION;
    else become_open(c);
    return (size_t)(end + 4 - bytes);
}

static void handle_session(Client *c, const char *text, size_t len) {
    if (c->state == SESSION && len && text[0] == '0') {
        append_frame(&c->out, TEXT, true, "40/ws,", 6);
        c->state = NAMESPACE;
    } else if (c->state == NAMESPACE && len > 6 && memcmp(text, "40/ws,", 6) == 0) become_open(c);
    else fail("an unexpected packet: %.*s", (int)(len < 300 ? len : 300), text);
}

static void drop(Client *c) {
    if (c->state == GONE) return;
    struct linger reset = {.l_onoff = 1, .l_linger = 0};  /* leaves no port in TIME_WAIT */
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &reset, sizeof reset);
    close(c->fd);
    c->state = GONE;
    gone++;
}

static void say_goodbye(Client *c) {
    c->closing = true;
    append_frame(&c->out, CLOSE, true, "\x03\xe8", 2);
}

/* The server has ended the connection: one session is over, the next begins. */
static void end_session(Client *c) {
    if (!c->said_goodbye) fail("the server closed a connection without a close frame");
    drop(c);
    count.sessions++;
    c->closing = c->said_goodbye = false;
    c->in.len = c->out.len = 0;
    if (!stopping) start_connect(c);
}

/* ---- event loop ------------------------------------------------------------------------------- */

static uint8_t *scratch;
enum { SCRATCH = 4 << 20 };
static int request_timer = -1, publish_timer = -1;
static bool stdin_ended;

static void handle_frame(Client *c, int opcode, const char *payload, size_t len, uint64_t now) {
    if (opcode == PING) append_frame(&c->out, PONG, true, payload, len);
    else if (c->closing) c->said_goodbye |= opcode == CLOSE;
    else if (opcode == CLOSE)
        fail("the server closed a connection: %d %.*s",
             len >= 2 ? (uint8_t)payload[0] << 8 | (uint8_t)payload[1] : 0, len > 2 ? (int)len - 2 : 0, payload + 2);
    else if (opcode == PONG) return;
    else if (c->state != OPEN) handle_session(c, payload, len);
    else if (opt.socketio) handle_packet(c, payload, len, now);
    else handle_envelope(c, payload, len, 0, now);
}

static void handle_bytes(Client *c, const uint8_t *bytes, size_t have, uint64_t now) {
    size_t at = 0, taken = 1, len;
    int opcode;
    const char *payload;
    if (c->state == UPGRADING) at = handle_upgrade(c, (const char *)bytes, have);
    while (opt.http && taken) at += taken = take_http(c, (const char *)bytes + at, have - at, now);
    while (!opt.http && c->state != UPGRADING && taken) {
        taken = take_frame(bytes + at, have - at, &opcode, &payload, &len);
        if (taken) handle_frame(c, opcode, payload, len, now);
        at += taken;
    }
    c->in.len = 0;
    if (at < have) append(&c->in, bytes + at, have - at);
}

static void handle_readable(Client *c) {
    size_t kept = c->in.len;
    if (kept) memcpy(scratch, c->in.data, kept);
    ssize_t got = recv(c->fd, scratch + kept, SCRATCH - kept, 0);
    if (got < 0 && errno == EAGAIN) return;
    if (got <= 0) {
        if (!c->closing) fail("the server dropped a connection: %s", got ? strerror(errno) : "end of stream");
        if (opt.sessions) end_session(c);
        else drop(c);
        return;
    }
    count.bytes_in += (uint64_t)got;
    handle_bytes(c, scratch, kept + (size_t)got, now_ns());
    flush(c);
}

static void handle_request_timer(void) {
    static uint32_t slot;
    uint64_t ticked = 0, now = now_ns();
    if (read(request_timer, &ticked, sizeof ticked) < 0 || stopping) return;
    for (Client *c = clients; c < clients + opt.clients; c++) {
        /* Late ones count from when they were due, or a slow server would hide its slowness. */
        for (uint64_t due = ticked; due-- > 0;) {
            slot = (slot + 1) % (uint32_t)opt.inflight;
            if (c->slots[slot].id) count.late++;
            else request(c, slot, now - due * (uint64_t)opt.every_us * 1000);
        }
        flush(c);
    }
}

static void handle_publish_timer(void) {
    uint64_t ticked = 0, now = now_ns();
    if (read(publish_timer, &ticked, sizeof ticked) < 0 || stopping) return;
    while (ticked-- > 0) publish(now);
    flush(publisher);
}

static void run_once(int timeout_ms) {
    struct epoll_event events[64];
    int ready = epoll_wait(epoll_fd, events, 64, timeout_ms);
    for (int i = 0; i < ready; i++) {
        Client *c = events[i].data.ptr;
        if ((void *)c == &request_timer) handle_request_timer();
        else if ((void *)c == &publish_timer) handle_publish_timer();
        else if ((void *)c == &stdin_ended) { char byte; stdin_ended = read(0, &byte, 1) <= 0; }
        else if (c->state == GONE) continue;
        else if (c->state == CONNECTING) handle_connected(c);
        else {
            if (events[i].events & EPOLLOUT) flush(c);
            if (events[i].events & ~(uint32_t)EPOLLOUT) handle_readable(c);
        }
    }
}

static void run_until(uint64_t deadline) {
    for (uint64_t now; (now = now_ns()) < deadline;) run_once((int)((deadline - now) / 1000000) + 1);
}

static void *watched(int fd, void *mark) {
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = mark};
    epoll_ctl(epoll_fd, EPOLL_CTL_ADD, fd, &event);
    return mark;
}

static int start_timer(long every_us, int *timer) {
    struct timespec period = {every_us / 1000000, every_us % 1000000 * 1000};
    struct itimerspec both = {period, period};
    *timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK);
    timerfd_settime(*timer, 0, &both, NULL);
    watched(*timer, timer);
    return *timer;
}

static void open_all(int at_once) {
    uint64_t deadline = now_ns() + 60000000000u;
    started = opened = gone = 0;
    while (started < client_count && started < at_once) start_connect(&clients[started]);
    while (opened < client_count) {
        run_once(1000);
        if (now_ns() > deadline) fail("only %d of %d clients could connect", opened, client_count);
    }
}

/* Closes with a close frame, as clients do; what is not gone after a second is cut. */
static void close_all(void) {
    uint64_t deadline = now_ns() + 1000000000u;
    for (int i = 0; i < client_count; i++) {
        if (opt.http) { drop(&clients[i]); continue; }
        say_goodbye(&clients[i]);
        flush(&clients[i]);
    }
    while (gone < client_count && now_ns() < deadline) run_once(10);
    for (int i = 0; i < client_count; i++) drop(&clients[i]);
}

/* ---- reports ---------------------------------------------------------------------------------- */

static struct { uint64_t wall, own_cpu, server_cpu; } start;

static void start_window(void) {
    memset(&count, 0, sizeof count);
    memset(&latency, 0, sizeof latency);
    memset(&flush_time, 0, sizeof flush_time);
    start.wall = now_ns();
    start.own_cpu = clock_ns(CLOCK_PROCESS_CPUTIME_ID);
    start.server_cpu = server_cpu_ns();
}

static void print_histogram(const char *name, const Histogram *h) {
    if (!h->total) return;
    printf(", \"%s\": {\"p50\": %.1f, \"p90\": %.1f, \"p99\": %.1f, \"p999\": %.1f, \"max\": %.1f}", name,
           percentile_us(h, .5), percentile_us(h, .9), percentile_us(h, .99), percentile_us(h, .999), (double)h->max / 1000);
}

static void print_window(void) {
    double wall = (double)(now_ns() - start.wall) / 1e9;
    double own = (double)(clock_ns(CLOCK_PROCESS_CPUTIME_ID) - start.own_cpu) / 1e9;
    double server = (double)(server_cpu_ns() - start.server_cpu) / 1e9;
    printf("{\"seconds\": %.3f, \"clients\": %d, \"requests\": %llu, \"requests_per_s\": %.1f", wall, client_count,
           (unsigned long long)count.requests, (double)count.requests / wall);
    printf(", \"sessions\": %llu, \"sessions_per_s\": %.1f", (unsigned long long)count.sessions, (double)count.sessions / wall);
    printf(", \"broadcasts\": %llu, \"deliveries\": %llu, \"deliveries_per_s\": %.1f", (unsigned long long)count.broadcasts,
           (unsigned long long)count.deliveries, (double)count.deliveries / wall);
    printf(", \"bytes_in_per_s\": %.0f, \"late\": %llu", (double)count.bytes_in / wall, (unsigned long long)count.late);
    printf(", \"load_cpu\": %.3f, \"server_cpu\": %.3f", own / wall, server / wall);
    if (opt.pid && count.requests) printf(", \"server_us_per_request\": %.3f", server * 1e6 / (double)count.requests);
    print_histogram("latency_us", &latency);
    print_histogram("flush_us", &flush_time);
    printf("}\n");
}

/* ---- main ------------------------------------------------------------------------------------- */

static void allow_descriptors(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    if ((rlim_t)client_count + 32 > limit.rlim_max) fail("%d clients need a higher `ulimit -n`", client_count);
}

/* Clients in this order: those that request, slow ones, the publisher, listeners. */
static void make_clients(void) {
    bool publishes = opt.publish || opt.publish_every_us;
    if (opt.handshakes) opt.listeners = opt.handshakes;
    if (publishes) opt.listeners = opt.listeners > 0 ? opt.listeners - 1 : 0;
    client_count = (int)(opt.clients + opt.slow + publishes + opt.listeners);
    allow_descriptors();
    clients = calloc((size_t)client_count, sizeof *clients);
    Client *c = clients;
    for (long i = 0; i < opt.clients; i++, c++) c->slots = calloc((size_t)opt.inflight, sizeof(Slot));
    for (long i = 0; i < opt.slow; i++) c++->role = SLOW;
    if (publishes) { publisher = c++; publisher->role = PUBLISHES; }
    while (c < clients + client_count) c++->role = LISTENS;
}

static void start_work(void) {
    Template slow = make_frames("countdown 600", 1);
    publish_template = make_frames("notify tick-10000000", 1);
    for (Client *c = clients; c < clients + client_count; c++) {
        if (c->role == SLOW) append_request(&c->out, &slow, FIRST_ID);
        for (long k = 0; c->role == REQUESTS && !opt.every_us && k < opt.inflight; k++) request(c, (uint32_t)k, now_ns());
        flush(c);
    }
    for (long k = 0; k < opt.publish; k++) publish(now_ns());
    if (publisher) flush(publisher);
    if (opt.every_us) start_timer(opt.every_us, &request_timer);
    if (opt.publish_every_us) start_timer(opt.publish_every_us, &publish_timer);
}

static void measure_work(void) {
    open_all(CONNECTS_AT_ONCE);
    /* A socket that has just talked delays its ACKs until 40 ms of silence; then it sends them as it
     * reads. So a server that connects its clients quicker paid more for each broadcast. */
    run_until(now_ns() + SETTLE_NS);
    start_work();
    run_until(now_ns() + (uint64_t)opt.warmup_ms * 1000000);
    start_window();
    run_until(start.wall + (uint64_t)opt.milliseconds * 1000000);
    print_window();
    stopping = true;
    uint64_t deadline = now_ns() + 10000000000u;
    while ((outstanding || ticks_done != ticks_sent) && now_ns() < deadline) run_once(100);
    if (outstanding) fail("%ld requests were never answered", outstanding);
    if (ticks_done != ticks_sent) fail("%u broadcasts did not reach every client", ticks_sent - ticks_done);
    close_all();
}

static void measure_sessions(void) {
    for (int i = 0; i < client_count; i++) start_connect(&clients[i]);
    run_until(now_ns() + (uint64_t)opt.warmup_ms * 1000000);
    start_window();
    run_until(start.wall + (uint64_t)opt.milliseconds * 1000000);
    print_window();
    stopping = true;
    gone = 0;
    uint64_t deadline = now_ns() + 10000000000u;
    while (gone < client_count && now_ns() < deadline) run_once(100);
    if (gone < client_count) fail("%d connections were never closed", client_count - gone);
}

/* Opens all, closes all, again and again; only the opening is timed. */
static void measure_handshakes(void) {
    uint64_t spent = 0, server = 0, own = 0, total = 0, until = now_ns() + (uint64_t)opt.milliseconds * 4000000;
    bool warm = false;
    while (spent < (uint64_t)opt.milliseconds * 1000000 && (now_ns() < until || !total)) {
        for (int i = 0; i < client_count; i++) { clients[i].closing = false; clients[i].in.len = clients[i].out.len = 0; }
        start_window();
        open_all((int)opt.inflight);
        if (warm) {
            spent += now_ns() - start.wall;
            own += clock_ns(CLOCK_PROCESS_CPUTIME_ID) - start.own_cpu;
            server += server_cpu_ns() - start.server_cpu;
            total += (uint64_t)client_count;
        }
        else memset(&open_time, 0, sizeof open_time);
        warm = true;
        close_all();
    }
    double wall = (double)spent / 1e9;
    printf("{\"seconds\": %.3f, \"handshakes\": %llu, \"handshakes_per_s\": %.1f, \"load_cpu\": %.3f, \"server_cpu\": %.3f",
           wall, (unsigned long long)total, (double)total / wall, (double)own / 1e9 / wall, (double)server / 1e9 / wall);
    print_histogram("latency_us", &open_time);
    printf("}\n");
}

static void hold(void) {
    open_all(CONNECTS_AT_ONCE);
    printf("{\"open\": %d}\n", opened);
    fflush(stdout);
    watched(0, &stdin_ended);
    while (!stdin_ended) run_once(1000);
    close_all();
}

int main(int argc, char **argv) {
    parse_options(argc, argv);
    make_clients();
    make_request();
    scratch = malloc(SCRATCH);
    epoll_fd = epoll_create1(EPOLL_CLOEXEC);
    if (opt.hold) hold();
    else if (opt.handshakes) measure_handshakes();
    else if (opt.sessions) measure_sessions();
    else measure_work();
    return 0;
}
