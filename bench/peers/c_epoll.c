/* The machine's limit: a C server that parses frames, copies the id into a fixed answer, and writes.
 * The load's command lines hold the same digits as their ids, so that they are answered rightly, too.
 *
 * It knows no JSON, no doors, no limits and no slow clients, and it accepts only the load's own
 * Sec-WebSocket-Key. A request that holds the word "notify" is also sent on to every client, one
 * write for each client and broadcast. Any error of a client drops that client.
 */
#define _GNU_SOURCE
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

enum { MAX_CLIENTS = 65536, SCRATCH = 1 << 20 };

typedef struct { int upgraded; uint32_t kept; uint8_t *rest; } Client;

static Client clients[MAX_CLIENTS]; /* by descriptor */
static int highest;
static uint8_t in[SCRATCH], out[SCRATCH];
static size_t out_len;

static const char UPGRADE[] =
    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    "Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
static const char ANSWER[] =
    "{\"type\":\"command_response\",\"data\":{\"command\":\"echo w00000000 w00000000\","
    "\"result\":\"w00000000 w00000000\"},\"id\":00000000}";
static const char HELLO[] =
    "{\"type\":\"command_response\",\"data\":{\"command\":\"echo hello\",\"result\":\"hello\"},\"id\":00000000}";
static const char STATUS[] =
    "{\"type\":\"status_update\",\"data\":{\"vision\":{},\"language\":{},\"command\":{}},\"id\":00000000}";
static const char NEWS[] =
    "{\"type\":\"notification\",\"data\":{\"message\":\"tick-00000000\",\"level\":\"info\","
    "\"time\":\"2026-01-31T12:00:00.123456+00:00\"}}";

static void drop(int fd) {
    free(clients[fd].rest);
    clients[fd] = (Client){0};
    close(fd);
}

static size_t put_frame(uint8_t *to, const char *payload, size_t len, const char *digits) {
    size_t head = 2;
    to[0] = 0x81;
    to[1] = (uint8_t)len;
    if (len >= 126) { to[1] = 126; to[2] = (uint8_t)(len >> 8); to[3] = (uint8_t)len; head = 4; }
    memcpy(to + head, payload, len);
    for (uint8_t *at = to + head; (at = memmem(at, (size_t)(to + head + len - at), "00000000", 8)); at += 8)
        memcpy(at, digits, 8);
    return head + len;
}

static void broadcast(const char *digits) {
    uint8_t frame[256];
    size_t len = put_frame(frame, NEWS, sizeof NEWS - 1, digits);
    for (int fd = 0; fd <= highest; fd++)
        if (clients[fd].upgraded) send(fd, frame, len, MSG_NOSIGNAL);
}

static void handle_message(int fd, uint8_t *payload, size_t len, const uint8_t *mask) {
    for (size_t i = 0; i < len; i++) payload[i] ^= mask[i & 3];
    const char *id = memmem(payload, len, "\"id\":", 5);
    if (!id) return;
    if (memmem(payload, len, "notify", 6)) broadcast(id + 5);
    if (out_len > SCRATCH - 256) { send(fd, out, out_len, MSG_NOSIGNAL); out_len = 0; }
    if (memmem(payload, len, "get_status", 10))
        out_len += put_frame(out + out_len, STATUS, sizeof STATUS - 1, id + 5);
    else if (memmem(payload, len, "hello", 5))
        out_len += put_frame(out + out_len, HELLO, sizeof HELLO - 1, id + 5);
    else
        out_len += put_frame(out + out_len, ANSWER, sizeof ANSWER - 1, id + 5);
}

/* Returns the whole length of one masked frame of up to 64 KiB, or 0 if it is not all there. */
static size_t handle_frame(int fd, uint8_t *bytes, size_t have) {
    size_t head = 6, len;
    if (have < 8) return 0;
    len = bytes[1] & 0x7f;
    if (len == 126) { len = (size_t)bytes[2] << 8 | bytes[3]; head = 8; }
    if (have < head + len) return 0;
    if ((bytes[0] & 15) == 8) {
        send(fd, "\x88\x02\x03\xe8", 4, MSG_NOSIGNAL);
        drop(fd);
        return 0;
    }
    handle_message(fd, bytes + head, len, bytes + head - 4);
    return head + len;
}

static void handle_readable(int fd) {
    Client *c = &clients[fd];
    size_t at = 0, taken, have = c->kept;
    int upgraded = c->upgraded;
    if (have) memcpy(in, c->rest, have);
    ssize_t got = recv(fd, in + have, SCRATCH - have, 0);
    if (got <= 0) { drop(fd); return; }
    have += (size_t)got;
    if (!c->upgraded) {
        const uint8_t *end = memmem(in, have, "\r\n\r\n", 4);
        if (end) {
            c->upgraded = upgraded = 1;
            at = (size_t)(end + 4 - in);
            send(fd, UPGRADE, sizeof UPGRADE - 1, MSG_NOSIGNAL);
        }
    }
    out_len = 0;
    while (c->upgraded && (taken = handle_frame(fd, in + at, have - at))) at += taken;
    if (upgraded && !c->upgraded) return; /* a close frame: the client is dropped */
    if (out_len) send(fd, out, out_len, MSG_NOSIGNAL);
    c->kept = (uint32_t)(have - at);
    if (c->kept) memcpy(c->rest = realloc(c->rest, c->kept), in + at, c->kept);
}

int main(int argc, char **argv) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK),
                                  .sin_port = htons((uint16_t)atoi(argc > 1 ? argv[1] : "8000"))};
    struct rlimit limit;
    struct epoll_event event = {.events = EPOLLIN}, events[256];
    int one = 1, poll = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM, 0);
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 1024)) {
        perror("c_epoll");
        return 2;
    }
    event.data.fd = listener;
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(poll, events, 256, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd != listener) { handle_readable(fd); continue; }
            fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
            if (fd < 0 || fd >= MAX_CLIENTS) { close(fd); continue; }
            setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
            if (fd > highest) highest = fd;
            event.data.fd = fd;
            epoll_ctl(poll, EPOLL_CTL_ADD, fd, &event);
        }
    }
}
