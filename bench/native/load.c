/* A strict HTTP/1.1 load client: many connections, one thread, every answer checked to the byte.
 *
 *   load HOST:PORT|unix:PATH --connections C --requests R [--stream] [--tokens N] [--interval-us U]
 *        [--model NAME] [--path P] [--body-bytes B] [--foreign] [--hold-s S]
 *
 * R requests in all, C at a time, each connection one after the other, kept alive where the server keeps it.
 * Checked: status 200, header lines, exactly one framing, chunk sizes and ends, no byte too many; events in
 * order, of this very request (its `user` comes back), all tokens, one [DONE] at the end. --foreign: a real
 * model answers, whose tokens are not known. --hold-s: after opening, once each stream has its first event, wait S
 * seconds and end (idle streams). Prints one JSON object. Times are from just before connecting or sending.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <ctype.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

/* of each connection; thousands of them share less */
static size_t in_cap = 1 << 20;

enum phase { CLOSED, SENDING, HEAD, SIZED, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, LAST_END, TO_CLOSE };

typedef struct {
    int fd, phase, keep, fresh, done_seen;
    char *request; size_t request_len, sent;
    char *in; size_t in_len;
    char *body; size_t body_len, body_cap, parsed;   /* payload, and how far its events were read */
    long left, next_token, events;
    long long started_us, first_us;
    char user[32];
    int number;
} conn_t;

static struct sockaddr_storage address;
static socklen_t address_len;
static const char *host, *path = "/v1/chat/completions", *model = "fake";
static long connections = 1, requests = 1, tokens = 8, interval_us, body_bytes, hold_s;
static int stream, foreign, epfd;
static long issued, finished, errors, events_total, chunks_total, bytes_total, opened;
static char first_error[300];
static double *first_times, *total_times;
static long time_count;

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void watch(int fd, int op, uint32_t what, conn_t *c) {
    struct epoll_event e = {.events = what, .data.ptr = c};
    epoll_ctl(epfd, op, fd, &e);
}

static void start(conn_t *c);

static void hang_up(conn_t *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
    c->phase = CLOSED;
}

static void wrong(conn_t *c, const char *what) {
    if (!errors++)
        snprintf(first_error, sizeof first_error, "%s (%s, %zu bytes of body, %ld events)", what, c->user,
                 c->body_len, c->events);
    hang_up(c);
    finished++;
    start(c);
}

static void complete(conn_t *c) {
    c->body[c->body_len] = 0;
    if (stream && !c->done_seen) { wrong(c, "stream without [DONE]"); return; }
    if (stream && c->parsed != c->body_len) { wrong(c, "half an event at the end"); return; }
    if (stream && !foreign && c->next_token != tokens) { wrong(c, "tokens missing"); return; }
    if (!stream && (c->body[0] != '{' || c->body[c->body_len - 1] != '}')) { wrong(c, "not a JSON object"); return; }
    if (!stream && !foreign && !strstr(c->body, c->user)) { wrong(c, "another request's answer"); return; }
    first_times[time_count] = c->first_us - c->started_us;
    total_times[time_count++] = now_us() - c->started_us;
    finished++;
    if (!c->keep) hang_up(c);
    else if (c->in_len) { finished--; time_count--; wrong(c, "bytes behind the answer"); return; }
    start(c);
}

/* Reads the whole events there are; 0 when one is not what it should be. */
static const char *read_events(conn_t *c) {
    for (;;) {
        char *at = c->body + c->parsed, *end = memmem(at, c->body_len - c->parsed, "\n\n", 2), expected[40], *content;
        if (!end) return NULL;
        *end = 0;
        c->parsed = end + 2 - c->body;
        if (at[0] == ':') continue;
        if (c->done_seen) return "event after [DONE]";
        if (strncmp(at, "data: ", 6)) return "not an event";
        if (!strcmp(at, "data: [DONE]")) { c->done_seen = 1; continue; }
        if (strstr(at, "\"error\"")) return "error event";
        c->events++;
        events_total++;
        if (foreign) continue;
        if (!strstr(at, c->user)) return "another request's event";
        content = strstr(at, "\"content\":\"t");
        snprintf(expected, sizeof expected, "\"content\":\"t%ld \"", c->next_token);
        if (content && strncmp(content, expected, strlen(expected))) return "event out of order";
        if (content) c->next_token++;
    }
}

static int payload(conn_t *c, const char *data, size_t len) {
    const char *fault;
    if (!c->first_us && len) c->first_us = now_us();
    if (c->body_len + len + 1 > c->body_cap) {
        c->body_cap = (c->body_len + len + 1) * 2;
        c->body = realloc(c->body, c->body_cap);
    }
    memcpy(c->body + c->body_len, data, len);
    c->body_len += len;
    bytes_total += len;
    if (!stream) return 1;
    if ((fault = read_events(c))) { wrong(c, fault); return 0; }
    if (c->parsed) {   /* keep only what is not read yet */
        memmove(c->body, c->body + c->parsed, c->body_len - c->parsed);
        c->body_len -= c->parsed;
        c->parsed = 0;
    }
    return 1;
}

static int head(conn_t *c, char *end) {
    char *line = c->in, *next;
    int lengths = 0, chunked = 0, closing = 0;
    if (strncmp(line, "HTTP/1.1 200 ", 13)) {
        char what[120];
        snprintf(what, sizeof what, "status line %.60s", strtok(line, "\r"));
        wrong(c, what);
        return 0;
    }
    for (line = strstr(line, "\r\n") + 2; line < end; line = next + 2) {
        char *colon;
        next = strstr(line, "\r\n");
        *next = 0;
        colon = strchr(line, ':');
        if (!colon || colon == line || isspace((unsigned char)line[0]) || isspace((unsigned char)colon[-1])) {
            wrong(c, "bad header line");
            return 0;
        }
        if (!strncasecmp(line, "content-length:", 15)) { lengths++; c->left = atol(colon + 1); }
        if (!strncasecmp(line, "transfer-encoding:", 18)) chunked += strcasestr(colon, "chunked") ? 1 : 9;
        if (!strncasecmp(line, "connection:", 11) && strcasestr(colon, "close")) closing = 1;
    }
    c->keep = !closing;
    if (lengths + chunked > 1) { wrong(c, "two framings"); return 0; }
    if (!lengths && !chunked && !closing) { wrong(c, "no framing"); return 0; }
    c->phase = chunked ? CHUNK_SIZE : lengths ? SIZED : TO_CLOSE;
    return 1;
}

/* Consumes what it can of the input; returns 0 when the connection has moved on to something else. */
static int digest(conn_t *c) {
    size_t at = 0, at_before;
    int phase_before;
    do {
        at_before = at;
        char *data = c->in + at, *end;
        size_t len = c->in_len - at, take;
        phase_before = c->phase;
        c->in[c->in_len] = 0;
        switch (c->phase) {
        case HEAD:
            if (!(end = memmem(data, len, "\r\n\r\n", 4))) break;
            if (!head(c, end + 2)) return 0;
            at = end + 4 - c->in;
            break;
        case SIZED:
            take = len < (size_t)c->left ? len : (size_t)c->left;
            if (take && !payload(c, data, take)) return 0;
            at += take;
            c->left -= take;
            break;
        case CHUNK_SIZE:
            if (!(end = memmem(data, len, "\r\n", 2))) break;
            if (!isxdigit((unsigned char)data[0])) { wrong(c, "bad chunk size"); return 0; }
            c->left = strtol(data, &data, 16);
            if (data != end && *data != ';') { wrong(c, "bad chunk size"); return 0; }
            at = end + 2 - c->in;
            chunks_total++;
            c->phase = c->left ? CHUNK_DATA : LAST_END;
            break;
        case CHUNK_DATA:
            take = len < (size_t)c->left ? len : (size_t)c->left;
            if (take && !payload(c, data, take)) return 0;
            at += take;
            if (!(c->left -= take)) c->phase = CHUNK_END;
            break;
        case CHUNK_END:
        case LAST_END:
            if (len < 2) break;
            if (data[0] != '\r' || data[1] != '\n') { wrong(c, "chunk does not end"); return 0; }
            at += 2;
            c->phase = c->phase == CHUNK_END ? CHUNK_SIZE : SIZED;
            c->left = 0;
            break;
        case TO_CLOSE:
            if (len && !payload(c, data, len)) return 0;
            at += len;
            break;
        }
        if (c->phase == SIZED && !c->left) {
            c->in_len -= at;
            complete(c);
            return 0;
        }
    } while (c->phase != phase_before || at != at_before);   /* a read may end between CR and LF */
    memmove(c->in, c->in + at, c->in_len - at);
    c->in_len -= at;
    if (c->in_len >= in_cap - 1) { wrong(c, "endless line"); return 0; }
    return 1;
}

static void readable(conn_t *c) {
    ssize_t n = recv(c->fd, c->in + c->in_len, in_cap - 1 - c->in_len, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        if (n == 0 && c->phase == TO_CLOSE) { c->keep = 0; complete(c); return; }
        if (c->phase == HEAD && !c->in_len && !c->fresh) {   /* an idle connection closed under us: once more */
            hang_up(c);
            issued--;
            start(c);
            return;
        }
        wrong(c, n ? strerror(errno) : "closed early");
        return;
    }
    c->in_len += n;
    digest(c);
}

static void writable(conn_t *c) {
    ssize_t n = send(c->fd, c->request + c->sent, c->request_len - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) {
        if (!c->fresh) { hang_up(c); issued--; start(c); } else wrong(c, strerror(errno));
        return;
    }
    c->sent += n;
    if (c->sent == c->request_len) {
        c->phase = HEAD;
        watch(c->fd, EPOLL_CTL_MOD, EPOLLIN, c);
    }
}

static void compose(conn_t *c) {
    char body[1024];
    int n;
    snprintf(c->user, sizeof c->user, "u%dr%ld.", c->number, issued);
    n = snprintf(body, sizeof body,
                 "{\"model\":\"%s\",\"max_tokens\":%ld,\"seed\":%ld,\"user\":\"%s\",\"stream\":%s,\"messages\":"
                 "[{\"role\":\"user\",\"content\":\"Say something. ", model, tokens, interval_us, c->user, stream ? "true" : "false");
    long total = n + 4 + body_bytes;
    if (!c->request) c->request = malloc(2048 + body_bytes);
    int at = sprintf(c->request, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nAccept: */*\r\n"
                     "User-Agent: bench\r\nAuthorization: Bearer sk-bench-0123456789\r\nContent-Length: %ld\r\n\r\n%s", path, host, total, body);
    memset(c->request + at, 'x', body_bytes);
    memcpy(c->request + at + body_bytes, "\"}]}", 4);
    c->request_len = at + body_bytes + 4;
    c->sent = 0;
}

static void start(conn_t *c) {
    int one = 1;
    if (issued >= requests) { hang_up(c); return; }
    issued++;
    compose(c);
    c->body_len = c->parsed = c->in_len = 0;
    c->next_token = c->events = c->done_seen = 0;
    c->first_us = 0;
    c->started_us = now_us();
    c->fresh = c->fd < 0;
    c->phase = SENDING;
    if (c->fresh) {
        c->fd = socket(address.ss_family, SOCK_STREAM | SOCK_NONBLOCK, 0);
        if (address.ss_family == AF_INET) setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (connect(c->fd, (struct sockaddr *)&address, address_len) && errno != EINPROGRESS) {
            wrong(c, strerror(errno));
            return;
        }
        watch(c->fd, EPOLL_CTL_ADD, EPOLLOUT, c);
        opened++;
    } else {
        watch(c->fd, EPOLL_CTL_MOD, EPOLLOUT, c);
        writable(c);
    }
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void print_times(const char *name, double *times) {
    double mean = 0;
    qsort(times, time_count, sizeof *times, by_value);
    for (long i = 0; i < time_count; i++) mean += times[i] / time_count;
    printf(", \"%s\": {\"p50\": %.0f, \"p90\": %.0f, \"p99\": %.0f, \"max\": %.0f, \"mean\": %.1f}", name,
           time_count ? times[time_count / 2] : -1, time_count ? times[time_count * 9 / 10] : -1,
           time_count ? times[time_count * 99 / 100] : -1, time_count ? times[time_count - 1] : -1, mean);
}

static void parse(int argc, char **argv) {
    host = argv[1];
    for (int i = 2; i < argc; i++) {
        const char *option = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(option, "--stream")) { stream = 1; continue; }
        if (!strcmp(option, "--foreign")) { foreign = 1; continue; }
        i++;
        if (!strcmp(option, "--connections")) connections = atol(value);
        else if (!strcmp(option, "--requests")) requests = atol(value);
        else if (!strcmp(option, "--tokens")) tokens = atol(value);
        else if (!strcmp(option, "--interval-us")) interval_us = atol(value);
        else if (!strcmp(option, "--model")) model = value;
        else if (!strcmp(option, "--path")) path = value;
        else if (!strcmp(option, "--body-bytes")) body_bytes = atol(value);
        else if (!strcmp(option, "--hold-s")) hold_s = atol(value);
        else { fprintf(stderr, "load: unknown option %s\n", option); exit(2); }
    }
    if (!strncmp(host, "unix:", 5)) {
        struct sockaddr_un *un = (struct sockaddr_un *)&address;
        un->sun_family = AF_UNIX;
        strncpy(un->sun_path, host + 5, sizeof un->sun_path - 1);
        address_len = sizeof *un;
        host = "localhost";
    } else {
        struct sockaddr_in *in = (struct sockaddr_in *)&address;
        char ip[64];
        int port;
        if (sscanf(host, "%60[0-9.]:%d", ip, &port) != 2) { fprintf(stderr, "load: bad address %s\n", host); exit(2); }
        in->sin_family = AF_INET;
        in->sin_port = htons(port);
        inet_pton(AF_INET, ip, &in->sin_addr);
        address_len = sizeof *in;
    }
}

int main(int argc, char **argv) {
    struct epoll_event ready[512];
    struct rlimit files;
    if (argc < 2) { fprintf(stderr, "usage: load HOST:PORT|unix:PATH [options]\n"); return 2; }
    parse(argc, argv);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    epfd = epoll_create1(0);
    first_times = calloc(requests, sizeof(double));
    total_times = calloc(requests, sizeof(double));
    conn_t *all = calloc(connections, sizeof *all);
    if (connections > 64) in_cap = 1 << 16;
    long long began = now_us(), give_up = began + 240000000LL, hold_until = 0;
    for (long i = 0; i < connections; i++) {
        all[i] = (conn_t){.fd = -1, .number = i, .in = malloc(in_cap), .body = malloc(4096), .body_cap = 4096};
    }
    for (long i = 0; i < connections; i++) start(&all[i]);
    while (finished < requests && now_us() < give_up) {
        int n = epoll_wait(epfd, ready, 512, 50);
        for (int i = 0; i < n; i++) {
            conn_t *c = ready[i].data.ptr;
            if (c->phase == CLOSED) continue;
            if (c->phase == SENDING) writable(c);
            else readable(c);
        }
        if (hold_s && !hold_until && events_total >= connections) hold_until = now_us() + hold_s * 1000000;
        if (hold_until && now_us() > hold_until) break;
    }
    double wall = (now_us() - began) / 1e6;
    if (!hold_s && finished < requests && !errors++) snprintf(first_error, sizeof first_error, "%ld answers missing at the deadline", requests - finished);
    if (hold_s) for (long i = 0; i < connections; i++) if (all[i].first_us) first_times[time_count++] = all[i].first_us - all[i].started_us;
    printf("{\"requests\": %ld, \"errors\": %ld, \"first_error\": \"%s\", \"wall_s\": %.4f, \"events\": %ld, \"chunks\": %ld, "
           "\"body_bytes\": %ld, \"connections_opened\": %ld", finished, errors, first_error, wall, events_total, chunks_total, bytes_total, opened);
    print_times("first_byte_us", first_times);
    print_times("total_us", total_times);
    printf("}\n");
    return errors ? 1 : 0;
}
