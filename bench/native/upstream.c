/* A llama-server that costs next to nothing: what is left of a measurement is the proxy.
 *
 *   upstream --port N        also as the child of llama.cpp's router (it passes more, and closes stdin to stop)
 *
 * POST anything: `max_tokens` events at one per `seed` microseconds when `"stream": true` (0 = at full
 * speed, one write each), else one JSON answer. `user` comes back in each event, so that a client can tell
 * its own answer from another's. GET anything: {"status":"ok"}. One thread, one epoll; Linux.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_FDS 65536
#define HEAD_MAX 32768
#define EVENT_MAX 1024

typedef struct {
    int open, streaming, close_after, watching_out;
    char *in;                 /* head and, of the body, what fits */
    size_t in_len;
    long body_left;           /* -1: still in the head */
    size_t body_at;
    char user[64];
    long tokens, sent_tokens, interval_us;
    long long next_us;
    char *out;                /* what the kernel did not take */
    size_t out_len;
} conn_t;

static conn_t conns[MAX_FDS];
static int epfd;
static int active[MAX_FDS], active_count;   /* streaming connections, each once */
static char listed[MAX_FDS];

static long long now_us(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000LL + t.tv_nsec / 1000;
}

static void watch(int fd, int op, uint32_t events) {
    struct epoll_event e = {.events = events, .data.fd = fd};
    epoll_ctl(epfd, op, fd, &e);
}

static void drop(int fd) {
    conn_t *c = &conns[fd];
    if (!c->open) return;
    free(c->in);
    free(c->out);
    memset(c, 0, sizeof *c);
    close(fd);
}

static void put(int fd, const char *data, size_t len) {
    conn_t *c = &conns[fd];
    ssize_t n = 0;
    if (!c->out_len) {
        n = send(fd, data, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN) { drop(fd); return; }
        if (n < 0) n = 0;
        if ((size_t)n == len) return;
    }
    c->out = realloc(c->out, c->out_len + len - n);
    memcpy(c->out + c->out_len, data + n, len - n);
    c->out_len += len - n;
    if (!c->watching_out) watch(fd, EPOLL_CTL_MOD, EPOLLIN | EPOLLOUT);
    c->watching_out = 1;
}

static void ready_for_next(int fd) {
    conn_t *c = &conns[fd];
    c->in_len = 0;
    c->body_left = -1;
    c->streaming = 0;
    if (c->close_after && !c->out_len) drop(fd);
}

/* One event; returns 0 when nothing more fits in the kernel's buffer now. */
static int put_event(int fd) {
    conn_t *c = &conns[fd];
    char event[EVENT_MAX], framed[EVENT_MAX + 32];
    int last = c->sent_tokens == c->tokens, n;
    if (last)
        n = snprintf(event, sizeof event,
                     "data: {\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"delta\":{}}],\"created\":1,"
                     "\"id\":\"chatcmpl-b\",\"model\":\"fake\",\"system_fingerprint\":\"%s\",\"object\":"
                     "\"chat.completion.chunk\"}\n\n", c->user);
    else
        n = snprintf(event, sizeof event,
                     "data: {\"choices\":[{\"finish_reason\":null,\"index\":0,\"delta\":{\"content\":\"t%ld \"}}],"
                     "\"created\":1,\"id\":\"chatcmpl-b\",\"model\":\"fake\",\"system_fingerprint\":\"%s\",\"object\":"
                     "\"chat.completion.chunk\"}\n\n", c->sent_tokens, c->user);
    c->sent_tokens++;
    n = snprintf(framed, sizeof framed, "%x\r\n%s\r\n", n, event);
    put(fd, framed, n);
    if (last && conns[fd].open) {
        static const char end[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
        put(fd, end, sizeof end - 1);
        if (conns[fd].open) ready_for_next(fd);
        return 0;
    }
    return conns[fd].open && !c->out_len;
}

static long field(const char *body, const char *name, long otherwise) {
    const char *at = strstr(body, name);
    if (!at) return otherwise;
    at += strlen(name);
    while (*at == ' ' || *at == ':') at++;
    return strtol(at, NULL, 10);
}

static void answer(int fd) {
    conn_t *c = &conns[fd];
    char *body = c->in + c->body_at, out[1024], json[600];
    int n;
    if (!strncmp(c->in, "GET ", 4) || !strncmp(c->in, "HEAD ", 5)) {
        n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n%s",
                     c->in[0] == 'G' ? "{\"status\":\"ok\"}" : "");
        put(fd, out, n);
        if (c->open) ready_for_next(fd);
        return;
    }
    c->tokens = field(body, "\"max_tokens\"", 1);
    c->interval_us = field(body, "\"seed\"", 0);
    snprintf(c->user, sizeof c->user, "none");
    for (char *user = strstr(body, "\"user\""); user; user = strstr(user + 1, "\"user\""))
        if (sscanf(user, "\"user\" : \"%60[A-Za-z0-9.-]\"", c->user) == 1) break;   /* else it is a role */
    if (strstr(body, "\"stream\":true") || strstr(body, "\"stream\": true")) {
        const char *head = "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nAccess-Control-Allow-Origin: \r\n"
                           "Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n";
        put(fd, head, strlen(head));
        if (!c->open) return;
        c->streaming = 1;
        c->sent_tokens = 0;
        c->next_us = now_us();
        if (!listed[fd]) active[active_count++] = fd;
        listed[fd] = 1;
        return;
    }
    n = snprintf(json, sizeof json,
                 "{\"choices\":[{\"finish_reason\":\"length\",\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":"
                 "\"t0 t1 t2 t3 t4 t5 t6 t7\"}}],\"created\":1,\"model\":\"fake\",\"system_fingerprint\":\"%s\",\"object\":"
                 "\"chat.completion\",\"usage\":{\"completion_tokens\":8,\"prompt_tokens\":4,\"total_tokens\":12},"
                 "\"id\":\"chatcmpl-b\"}", c->user);
    n = snprintf(out, sizeof out, "HTTP/1.1 200 OK\r\nServer: llama.cpp\r\nContent-Type: application/json; charset=utf-8\r\n"
                 "Content-Length: %d\r\n\r\n%s", n, json);
    put(fd, out, n);
    if (c->open) ready_for_next(fd);
}

static void readable(int fd) {
    conn_t *c = &conns[fd];
    static char scratch[1 << 18];
    char *end;
    ssize_t n;
    if (c->body_left > 0 && c->in_len >= HEAD_MAX) {   /* of a large body only the beginning is kept */
        n = recv(fd, scratch, sizeof scratch, 0);
        if (n <= 0) { if (n == 0 || errno != EAGAIN) drop(fd); return; }
        c->body_left -= n;
    } else {
        if (!c->in) c->in = malloc(HEAD_MAX + 1);
        n = recv(fd, c->in + c->in_len, HEAD_MAX - c->in_len, 0);
        if (n <= 0) { if (n == 0 || errno != EAGAIN) drop(fd); return; }
        c->in_len += n;
        c->in[c->in_len] = 0;
        if (c->body_left >= 0) c->body_left -= n;
        else if ((end = memmem(c->in, c->in_len, "\r\n\r\n", 4))) {
            char *length, *closing;
            *end = 0;
            length = strcasestr(c->in, "\ncontent-length:");
            closing = strcasestr(c->in, "\nconnection: close");
            c->close_after = closing != NULL;
            c->body_at = end + 4 - c->in;
            c->body_left = (length ? atol(length + 16) : 0) - (long)(c->in_len - c->body_at);
        }
    }
    if (c->body_left == 0) answer(fd);
    else if (c->body_left < -1) drop(fd);   /* pipelining is not for this one */
}

static void writable(int fd) {
    conn_t *c = &conns[fd];
    ssize_t n = send(fd, c->out, c->out_len, MSG_NOSIGNAL);
    if (n < 0) { if (errno != EAGAIN) drop(fd); return; }
    memmove(c->out, c->out + n, c->out_len - n);
    c->out_len -= n;
    if (c->out_len) return;
    watch(fd, EPOLL_CTL_MOD, EPOLLIN);
    c->watching_out = 0;
    if (c->close_after && c->body_left == -1) drop(fd);
}

static int feed_streams(void) {   /* returns the epoll timeout in ms */
    long long now = now_us();
    int timeout = 100, kept = 0;
    for (int i = 0; i < active_count; i++) {
        int fd = active[i];
        conn_t *c = &conns[fd];
        if (!c->open || !c->streaming) { listed[fd] = 0; continue; }
        if (c->interval_us == 0) {
            for (int burst = 0; burst < 8 && !c->out_len && put_event(fd); burst++) {}
            timeout = c->open && c->streaming && c->out_len ? timeout : 0;
        } else {
            while (c->open && c->streaming && c->next_us <= now) {
                c->next_us += c->interval_us;
                put_event(fd);
            }
            if (c->open && c->streaming) {
                long long wait_ms = (c->next_us - now) / 1000;
                if (wait_ms < timeout) timeout = wait_ms < 1 ? 1 : (int)wait_ms;
            }
        }
        if (c->open && c->streaming) active[kept++] = fd;
        else listed[fd] = 0;
    }
    active_count = kept;
    return timeout;
}

static int take(int listener) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), one = 1;
    if (fd < 0) return 0;
    if (fd >= MAX_FDS) { close(fd); return 1; }
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    memset(&conns[fd], 0, sizeof conns[fd]);
    conns[fd].open = 1;
    conns[fd].body_left = -1;
    watch(fd, EPOLL_CTL_ADD, EPOLLIN);
    return 1;
}

int main(int argc, char **argv) {
    struct sockaddr_in at = {.sin_family = AF_INET};
    struct rlimit files;
    struct epoll_event events[512];
    int port = 8080, one = 1, as_child = getenv("LLAMA_SERVER_ROUTER_PORT") != NULL;
    for (int i = 1; i + 1 < argc; i++)
        if (!strcmp(argv[i], "--port")) port = atoi(argv[i + 1]);
    signal(SIGPIPE, SIG_IGN);
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    at.sin_port = htons(port);
    at.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 4096)) {
        perror("upstream");
        return 1;
    }
    epfd = epoll_create1(0);
    watch(listener, EPOLL_CTL_ADD, EPOLLIN);
    if (as_child) {
        printf("cmd_child_to_router:state:{\"state\":\"ready\",\"payload\":{}}\n");
        fflush(stdout);
        fcntl(0, F_SETFL, O_NONBLOCK);
        watch(0, EPOLL_CTL_ADD, EPOLLIN);
    }
    for (int timeout = 100;;) {
        int n = epoll_wait(epfd, events, 512, timeout);
        for (int i = 0; i < n; i++) {
            int fd = events[i].data.fd;
            char line[256];
            if (fd == listener) while (take(listener)) {}
            else if (fd == 0 && as_child) {
                ssize_t got = read(0, line, sizeof line);
                if (got == 0) return 0;
                if (got > 0 && memmem(line, got, "cmd_router_to_child:exit", 24)) return 0;
            } else {
                if (events[i].events & EPOLLOUT && conns[fd].open) writable(fd);
                if (events[i].events & ~(uint32_t)EPOLLOUT && conns[fd].open) readable(fd);
            }
        }
        timeout = feed_streams();
    }
}
