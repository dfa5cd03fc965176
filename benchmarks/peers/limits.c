/* What the machine can do: echo over loopback TCP in C, the limit that every other peer is compared with.
 *
 *   limits server block|epoll|spin        prints {"port": N}, serves one connection after the other until stdin closes
 *   limits client PORT SERVER_PID block|spin
 *       reads lines "KIND SIZE IN_FLIGHT SECONDS" (KIND: echo, sink, pipe), prints one JSON object per line
 *
 * Frame: u32 length of the payload, u32 id, u8 kind (0 echo, 4 sink), 7 unused bytes; little endian. "block" sleeps in recv, "epoll" in epoll_wait (as a server
 * with many connections must), "spin" polls with MSG_DONTWAIT instead of sleeping in the kernel. A payload of 64 KiB and more is landed in a buffer of its own (malloc per message). */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define HEADER 16
#define CHUNK (512 * 1024)
#define LARGE (64 * 1024)

static int spin, use_epoll;

static void die(const char *what) { perror(what); exit(1); }

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t)) return 0;
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static ssize_t get(int fd, void *to, size_t n) {
    for (;;) {
        ssize_t r = recv(fd, to, n, spin ? MSG_DONTWAIT : 0);
        if (r >= 0) return r;
        if (errno != EAGAIN && errno != EINTR) return -1;
    }
}

static int get_all(int fd, char *to, size_t n) {
    while (n) {
        ssize_t r = get(fd, to, n);
        if (r <= 0) return -1;
        to += r;
        n -= r;
    }
    return 0;
}

static int put_all(int fd, struct iovec *iov, int count) {
    while (count) {
        ssize_t r = writev(fd, iov, count);
        if (r < 0) {
            if (errno == EAGAIN || errno == EINTR) continue;
            return -1;
        }
        while (count && (size_t)r >= iov->iov_len) { r -= iov->iov_len; iov++; count--; }
        if (count) { iov->iov_base = (char *)iov->iov_base + r; iov->iov_len -= r; }
    }
    return 0;
}

static void no_delay(int fd) {
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

/* Echo whole frames as they come; a large frame is received into its own buffer, then echoed or dropped. */
static void serve(int fd) {
    static char buffer[CHUNK];
    size_t have = 0;
    int ep = -1;
    if (use_epoll) {
        struct epoll_event e = {.events = EPOLLIN};
        ep = epoll_create1(0);
        epoll_ctl(ep, EPOLL_CTL_ADD, fd, &e);
    }
    for (;;) {
        ssize_t r = recv(fd, buffer + have, sizeof buffer - have, spin || use_epoll ? MSG_DONTWAIT : 0);
        if (r < 0 && (errno == EAGAIN || errno == EINTR)) {
            struct epoll_event e;
            if (use_epoll) epoll_wait(ep, &e, 1, -1);
            continue;
        }
        if (r <= 0) break;
        have += r;
        size_t done = 0;
        while (have - done >= HEADER) {
            uint32_t size;
            memcpy(&size, buffer + done, 4);
            int kind = buffer[done + 8];
            if (size >= LARGE) {
                char *own = malloc(size), header[HEADER];
                size_t part = have - done - HEADER;
                memcpy(header, buffer + done, HEADER);
                if (part > size) part = size;
                memcpy(own, buffer + done + HEADER, part);
                if (part < size && get_all(fd, own + part, size - part)) { free(own); goto end; }
                if (done) {
                    struct iovec v = {buffer, done};
                    if (put_all(fd, &v, 1)) { free(own); goto end; }
                }
                done += HEADER + part;
                memmove(buffer, buffer + done, have - done);
                have -= done;
                done = 0;
                if (kind == 4) memset(header, 0, 4);
                struct iovec v[2] = {{header, HEADER}, {own, kind == 4 ? 0 : size}};
                int bad = put_all(fd, v, 2);
                free(own);
                if (bad) goto end;
                continue;
            }
            if (have - done < HEADER + size) break;
            done += HEADER + size;
        }
        if (done) {
            struct iovec v = {buffer, done};
            if (put_all(fd, &v, 1)) break;
            memmove(buffer, buffer + done, have - done);
            have -= done;
        }
    }
end:
    if (ep >= 0) close(ep);
    close(fd);
}

static void *accept_loop(void *arg) {
    int listener = *(int *)arg;
    for (;;) {
        int fd = accept(listener, NULL, NULL);
        if (fd < 0) return NULL;
        no_delay(fd);
        serve(fd);
    }
}

static void server(void) {
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t n = sizeof a;
    if (listener < 0 || bind(listener, (struct sockaddr *)&a, n) || listen(listener, 16)) die("listen");
    getsockname(listener, (struct sockaddr *)&a, &n);
    printf("{\"port\": %d}\n", ntohs(a.sin_port));
    fflush(stdout);
    pthread_t thread;
    pthread_create(&thread, NULL, accept_loop, &listener);
    char c;
    while (read(0, &c, 1) > 0) { }
    _exit(0);
}

static int by_value(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

/* count calls, one in flight; fills lat[] */
static int ping_pong(int fd, char *frame, char *reply, size_t size, int sink, long count, int64_t *lat) {
    for (long i = 0; i < count; i++) {
        int64_t t = now_ns(CLOCK_MONOTONIC);
        struct iovec v = {frame, HEADER + size};
        if (put_all(fd, &v, 1) || get_all(fd, reply, HEADER + (sink ? 0 : size))) return -1;
        lat[i] = now_ns(CLOCK_MONOTONIC) - t;
    }
    return 0;
}

/* count frames with in_flight of them under way: as many are sent as have come back, in one write */
static int pipeline(int fd, char *frames, char *buffer, size_t size, long in_flight, long count, int64_t *lat) {
    size_t each = HEADER + size, partial = 0;
    long sent = 0, done = 0;
    int64_t *born = malloc(sizeof(int64_t) * in_flight);
    struct iovec v = {frames, each * in_flight};
    int64_t t = now_ns(CLOCK_MONOTONIC);
    for (long i = 0; i < in_flight; i++) born[i] = t;
    if (put_all(fd, &v, 1)) return -1;
    sent = in_flight;
    while (done < count) {
        ssize_t r = get(fd, buffer, CHUNK);
        if (r <= 0) return -1;
        long came = (partial + r) / each;
        partial = (partial + r) % each;
        t = now_ns(CLOCK_MONOTONIC);
        for (long i = 0; i < came; i++) {
            lat[done] = t - born[done % in_flight];
            born[done % in_flight] = t;
            done++;
        }
        long again = came < count - sent ? came : count - sent;
        if (again > 0) {
            v.iov_base = frames;
            v.iov_len = each * again;
            if (put_all(fd, &v, 1)) return -1;
            sent += again;
        }
    }
    free(born);
    return 0;
}

static void client(int port, int server_pid) {
    clockid_t server_cpu;
    if (clock_getcpuclockid(server_pid, &server_cpu)) server_cpu = -1;
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (connect(fd, (struct sockaddr *)&a, sizeof a)) die("connect");
    no_delay(fd);
    printf("{\"ready\": true}\n");
    fflush(stdout);
    char line[256], kind[32];
    long size, in_flight;
    double seconds;
    while (fgets(line, sizeof line, stdin)) {
        if (sscanf(line, "%31s %ld %ld %lf", kind, &size, &in_flight, &seconds) != 4) break;
        int sink = !strcmp(kind, "sink"), piped = in_flight > 1;
        size_t each = HEADER + size;
        char *frames = calloc(in_flight, each), *reply = malloc(each > CHUNK ? each : CHUNK);
        for (long i = 0; i < in_flight; i++) {
            uint32_t n = size, id = i;
            memcpy(frames + i * each, &n, 4);
            memcpy(frames + i * each + 4, &id, 4);
            frames[i * each + 8] = sink ? 4 : 0;
            memset(frames + i * each + HEADER, 'x', size);
        }
        long capacity = in_flight * 4 < 64 ? 64 : in_flight * 4, count = in_flight * 2;
        int64_t *lat = malloc(sizeof(int64_t) * capacity), elapsed, cpu, server0;
        double goal = 0.04;                       /* calibrate with runs that get longer, then measure */
        for (int last = 0;;) {
            int64_t t0 = now_ns(CLOCK_MONOTONIC), c0 = now_ns(CLOCK_PROCESS_CPUTIME_ID), s0 = now_ns(server_cpu);
            int bad = piped ? pipeline(fd, frames, reply, size, in_flight, count, lat)
                            : ping_pong(fd, frames, reply, size, sink, count, lat);
            if (bad) die("transfer");
            elapsed = now_ns(CLOCK_MONOTONIC) - t0;
            cpu = now_ns(CLOCK_PROCESS_CPUTIME_ID) - c0;
            server0 = now_ns(server_cpu) - s0;
            if (last) break;
            last = elapsed >= goal * 1e9;
            double want = (last ? seconds : goal * 1.5) / (elapsed / 1e9 + 1e-9) * count;
            long next = want > count * 16.0 ? count * 16 : (long)want;
            count = next < in_flight ? in_flight : next;
            if (count > 20000000) count = 20000000;
            if (count > capacity) { capacity = count; lat = realloc(lat, sizeof(int64_t) * capacity); }
        }
        qsort(lat, count, sizeof(int64_t), by_value);
        printf("{\"calls\": %ld, \"units\": %ld, \"seconds\": %.9f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"cpu_client\": %.9f, \"cpu_server\": %.9f}\n",
               count, count, elapsed / 1e9, lat[count / 2] / 1e3, lat[(long)(count * 0.99)] / 1e3, cpu / 1e9, server0 / 1e9);
        fflush(stdout);
        free(frames);
        free(reply);
        free(lat);
    }
}

int main(int argc, char **argv) {
    if (argc > 2 && !strcmp(argv[1], "server")) {
        spin = !strcmp(argv[2], "spin");
        use_epoll = !strcmp(argv[2], "epoll");
        server();
    } else if (argc > 4 && !strcmp(argv[1], "client")) {
        spin = !strcmp(argv[4], "spin");
        client(atoi(argv[2]), atoi(argv[3]));
    } else {
        fprintf(stderr, "usage: limits server block|epoll|spin | limits client PORT PID block|spin\n");
        return 2;
    }
    return 0;
}
