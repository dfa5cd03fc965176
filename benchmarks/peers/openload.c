/* Load on an OpenAI-compatible server that costs the machine as little as possible: one thread, epoll, prepared requests.
 *
 *   openload PORT REQUESTS CONCURRENCY RATE WARM_UP_S SECONDS TOKENS QUICKACK PID,PID,...
 *
 * REQUESTS is a file of whole HTTP/1.1 requests, each behind its length (u32, little endian); they are sent in turn over CONCURRENCY connections, each
 * with one request at a time: with a RATE of 0 the next one as soon as an answer has ended, otherwise RATE per second at random moments (Poisson, the
 * same ones in every run), and times count from these moments even if no connection was free. Answers that end within SECONDS after the warm-up count; the CPU time of the processes named by PID is taken between
 * the same two moments. Every answer is checked: status 200, usage with completion_tokens of TOKENS, and [DONE] at the end of a stream. Prints one JSON
 * object; an answer that is wrong ends the run with {"error": ...}.
 *
 * QUICKACK 1 acknowledges what arrives at once (TCP_QUICKACK), so that a server whose small writes wait for acknowledgements (Nagle) is not slowed down
 * by this client; 0 leaves it to the kernel, as ordinary clients do. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <math.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MAX_CONNECTIONS 4096
#define MAX_PIDS 64
#define READ_BYTES (256 * 1024)
#define HEAD_BYTES 8192
#define TAIL_BYTES 1024 /* holds usage and [DONE] of a stream, and the usage of an answer in one piece */
#define STUCK_S 15      /* without a byte from anybody */

enum state { HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER };

struct connection {
    int fd, status, streaming, chunked, line_length, last_newline;
    enum state state;
    int64_t sent, first, left;
    int head_length, tail_length;
    char head[HEAD_BYTES + 1]; /* of the reply; after it, the beginning of the body until a token was seen */
    char tail[TAIL_BYTES + 1];
};

struct request {
    const char *data;
    uint32_t size;
};

static struct connection connections[MAX_CONNECTIONS];
static struct request *requests;
static size_t request_count, next_request;
static struct connection *idle[MAX_CONNECTIONS];
static int quickack, tokens_wanted, in_flight, idle_count;
static double rate;
static int64_t begin_ns, end_ns, due_ns;
static int64_t *ttft, *latency;
static size_t done, room, events, reads, bytes;
static char buffer[READ_BYTES];

static void fail(const char *format, ...) {
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    for (char *c = text; *c; c++)
        if (*c == '"' || *c == '\\' || (unsigned char)*c < 32) *c = ' ';
    printf("{\"error\": \"%s\"}\n", text);
    exit(1);
}

static int64_t now_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t)) return 0;
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static double gap_s(void) {
    static uint64_t state = 88172645463325252; /* xorshift64 */
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return -log(((double)(state >> 11) + 0.5) / 9007199254740992.0) / rate;
}

static void send_next(struct connection *c, int64_t due) {
    struct request *request = &requests[next_request];
    next_request = (next_request + 1) % request_count;
    c->state = HEAD;
    c->head_length = c->tail_length = c->line_length = c->last_newline = 0;
    c->status = c->streaming = c->chunked = 0;
    c->first = 0;
    c->sent = due;
    in_flight++;
    for (uint32_t at = 0; at < request->size;) { /* requests are smaller than a socket's buffer */
        ssize_t n = send(c->fd, request->data + at, request->size - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail("send: %s", strerror(errno));
        at += (uint32_t)n;
    }
}

/* Whether a token's text has come: a content or text that is not empty. The role alone, which some servers send first, is none. */
static int has_token(const char *data, size_t size) {
    static const char *const names[] = {"\"content\":\"", "\"text\":\""};
    for (int i = 0; i < 2; i++) {
        size_t length = strlen(names[i]);
        const char *at = data, *end = data + size;
        while ((at = memmem(at, (size_t)(end - at), names[i], length)) && at + length < end) {
            at += length;
            if (*at != '"') return 1;
        }
    }
    return 0;
}

static void take(struct connection *c, const char *data, size_t size, int64_t now) {
    if (c->streaming) {
        const char *at = data, *end = data + size;
        if (c->last_newline && size && data[0] == '\n') events++;
        while ((at = memchr(at, '\n', (size_t)(end - at)))) {
            at++;
            if (at < end && *at == '\n') {
                events++;
                at++;
            }
        }
        c->last_newline = size ? data[size - 1] == '\n' && !(size > 1 && data[size - 2] == '\n') : c->last_newline;
        if (!c->first) {
            size_t kept = (size_t)c->head_length, fits = HEAD_BYTES - kept;
            if (size < fits) fits = size;
            memcpy(c->head + kept, data, fits);
            c->head_length += (int)fits;
            if (has_token(c->head, (size_t)c->head_length)) c->first = now;
        }
    }
    size_t keep = size < TAIL_BYTES ? size : TAIL_BYTES;
    size_t old = (size_t)c->tail_length + keep > TAIL_BYTES ? TAIL_BYTES - keep : (size_t)c->tail_length;
    memmove(c->tail, c->tail + c->tail_length - old, old);
    memcpy(c->tail + old, data + size - keep, keep);
    c->tail_length = (int)(old + keep);
}

static void finish(struct connection *c, int64_t now) {
    c->tail[c->tail_length] = 0;
    if (c->status != 200) fail("status %d: %.200s", c->status, c->tail);
    const char *usage = NULL, *at = c->tail;
    while ((at = strstr(at, "\"completion_tokens\":"))) usage = at += strlen("\"completion_tokens\":");
    if (!usage) fail("no usage in the answer: %.200s", c->tail);
    if (atoi(usage) != tokens_wanted) fail("%d tokens instead of %d", atoi(usage), tokens_wanted);
    if (c->streaming && !strstr(c->tail, "data: [DONE]")) fail("no [DONE] at the end of a stream");
    if (c->streaming && !c->first) fail("a stream without text");
    in_flight--;
    if (now >= begin_ns && now < end_ns) {
        if (done == room) {
            room = room ? 2 * room : 4096;
            ttft = realloc(ttft, room * sizeof *ttft);
            latency = realloc(latency, room * sizeof *latency);
            if (!ttft || !latency) fail("no memory");
        }
        ttft[done] = (c->first ? c->first : now) - c->sent;
        latency[done++] = now - c->sent;
    }
    if (rate > 0)
        idle[idle_count++] = c;
    else if (now < end_ns)
        send_next(c, now_ns(CLOCK_MONOTONIC));
}

static void read_head(struct connection *c) {
    c->head[c->head_length] = 0;
    if (sscanf(c->head, "HTTP/1.1 %d", &c->status) != 1) fail("no HTTP/1.1: %.100s", c->head);
    c->chunked = strcasestr(c->head, "\r\ntransfer-encoding: chunked\r\n") != NULL;
    c->streaming = strcasestr(c->head, "\r\ncontent-type: text/event-stream") != NULL;
    const char *length = strcasestr(c->head, "\r\ncontent-length:");
    if (!c->chunked && !length) fail("a reply without a length");
    c->left = c->chunked ? 0 : atoll(length + strlen("\r\ncontent-length:"));
    c->state = c->chunked ? CHUNK_SIZE : LENGTH;
    c->head_length = 0;
}

static void feed(struct connection *c, const char *data, size_t size, int64_t now) {
    const char *end = data + size;
    while (data < end) {
        size_t here = (size_t)(end - data);
        switch (c->state) {
        case HEAD:
            if (c->head_length == HEAD_BYTES) fail("a head of more than %d bytes", HEAD_BYTES);
            c->head[c->head_length++] = *data++;
            if (c->head_length >= 4 && !memcmp(c->head + c->head_length - 4, "\r\n\r\n", 4)) {
                read_head(c);
                if (c->state == LENGTH && !c->left) finish(c, now);
            }
            break;
        case LENGTH:
        case CHUNK_DATA:
            if (here > (size_t)c->left) here = (size_t)c->left;
            take(c, data, here, now);
            data += here;
            c->left -= (int64_t)here;
            if (c->left) break;
            if (c->state == LENGTH) {
                finish(c, now);
                if (data < end) fail("bytes behind the end of a reply");
            } else {
                c->state = CHUNK_END;
            }
            break;
        case CHUNK_SIZE:
            if (*data == '\n') {
                c->state = c->left ? CHUNK_DATA : TRAILER;
                c->line_length = 0;
            } else if (*data != '\r') {
                const char *digits = "0123456789abcdef", *found = strchr(digits, *data | 32);
                if (!found || !*found) fail("no size of a chunk");
                c->left = c->left * 16 + (found - digits);
            }
            data++;
            break;
        case CHUNK_END:
            if (*data++ == '\n') c->state = CHUNK_SIZE;
            break;
        case TRAILER:
            if (*data++ != '\n') {
                c->line_length++;
            } else if (c->line_length <= 1) {
                finish(c, now);
                if (data < end) fail("bytes behind the end of a reply");
            } else {
                c->line_length = 0;
            }
            break;
        }
    }
}

static int compare(const void *a, const void *b) {
    int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return x < y ? -1 : x > y;
}

static void print_quantiles(const char *name, int64_t *values) {
    if (!done) return;
    qsort(values, done, sizeof *values, compare);
    printf(", \"%s_p50_us\": %.1f, \"%s_p99_us\": %.1f", name, (double)values[done / 2] / 1e3, name, (double)values[done * 99 / 100] / 1e3);
}

static void load_requests(const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail("%s: %s", path, strerror(errno));
    fseek(file, 0, SEEK_END);
    long size = ftell(file);
    rewind(file);
    char *data = malloc((size_t)size);
    if (!data || fread(data, 1, (size_t)size, file) != (size_t)size) fail("cannot read %s", path);
    fclose(file);
    for (long at = 0; at + 4 <= size;) {
        uint32_t length;
        memcpy(&length, data + at, 4);
        requests = realloc(requests, (request_count + 1) * sizeof *requests);
        requests[request_count++] = (struct request){data + at + 4, length};
        at += 4 + (long)length;
    }
    if (!request_count) fail("%s holds no request", path);
}

int main(int argc, char **argv) {
    if (argc != 10) fail("usage: openload PORT REQUESTS CONCURRENCY RATE WARM_UP_S SECONDS TOKENS QUICKACK PIDS");
    int port = atoi(argv[1]), concurrency = atoi(argv[3]), epoll = epoll_create1(0), one = 1;
    double warm_up = atof(argv[5]), seconds = atof(argv[6]);
    rate = atof(argv[4]);
    tokens_wanted = atoi(argv[7]);
    quickack = atoi(argv[8]);
    clockid_t clocks[MAX_PIDS];
    int64_t cpu[MAX_PIDS], own = 0;
    int pids = 0, measuring = 0;
    for (char *at = strtok(argv[9], ","); at && pids < MAX_PIDS; at = strtok(NULL, ","))
        clocks[pids++] = (clockid_t)(~(unsigned)atoi(at) << 3 | 2); /* clock_getcpuclockid(3), without asking whether it exists */
    load_requests(argv[2]);
    if (concurrency < 1 || concurrency > MAX_CONNECTIONS) fail("a concurrency of %d", concurrency);

    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    for (int i = 0; i < concurrency; i++) {
        int fd = connections[i].fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address)) fail("port %d: %s", port, strerror(errno));
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = &connections[i]};
        if (epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event)) fail("epoll: %s", strerror(errno));
    }
    int64_t start = now_ns(CLOCK_MONOTONIC), heard = start;
    begin_ns = start + (int64_t)(warm_up * 1e9);
    end_ns = begin_ns + (int64_t)(seconds * 1e9);
    due_ns = start;
    for (int i = 0; i < concurrency; i++) {
        if (rate > 0)
            idle[idle_count++] = &connections[i];
        else
            send_next(&connections[i], now_ns(CLOCK_MONOTONIC));
    }

    size_t events_before = 0, reads_before = 0, bytes_before = 0;
    while (in_flight || measuring != 2) {
        struct epoll_event found[256];
        int64_t now = now_ns(CLOCK_MONOTONIC);
        if (!measuring && now >= begin_ns) {
            begin_ns = now;
            events_before = events, reads_before = reads, bytes_before = bytes;
            own = now_ns(CLOCK_PROCESS_CPUTIME_ID);
            for (int i = 0; i < pids; i++) cpu[i] = now_ns(clocks[i]);
            measuring = 1;
        } else if (measuring == 1 && now >= end_ns) {
            end_ns = now;
            events_before = events - events_before, reads_before = reads - reads_before, bytes_before = bytes - bytes_before;
            own = now_ns(CLOCK_PROCESS_CPUTIME_ID) - own;
            for (int i = 0; i < pids; i++) cpu[i] = now_ns(clocks[i]) - cpu[i];
            measuring = 2;
        }
        int64_t wait = 1000000;
        if (rate > 0 && now < end_ns) {
            while (due_ns <= now && idle_count) {
                send_next(idle[--idle_count], due_ns);
                due_ns += (int64_t)(gap_s() * 1e9);
            }
            if (due_ns > now && due_ns - now < wait) wait = due_ns - now;
        }
        struct timespec timeout = {.tv_nsec = wait};
        int count = epoll_pwait2(epoll, found, 256, &timeout, NULL);
        now = now_ns(CLOCK_MONOTONIC);
        if (!count && in_flight && now - heard > (int64_t)STUCK_S * 1000000000) fail("no byte for %d s, with %d requests in flight", STUCK_S, in_flight);
        for (int i = 0; i < count; i++) {
            struct connection *c = found[i].data.ptr;
            ssize_t n = recv(c->fd, buffer, sizeof buffer, MSG_DONTWAIT);
            if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
            if (n <= 0) fail("a connection was closed in the middle");
            if (quickack) setsockopt(c->fd, IPPROTO_TCP, TCP_QUICKACK, &one, sizeof one);
            heard = now_ns(CLOCK_MONOTONIC);
            reads++;
            bytes += (size_t)n;
            feed(c, buffer, (size_t)n, heard);
        }
    }
    if (!done) fail("not a single answer ended within %g s", seconds);
    printf("{\"done\": %zu, \"seconds\": %.6f, \"events\": %zu, \"reads\": %zu, \"bytes\": %zu, \"cpu_generator\": %.6f, \"cpu\": [", done,
           (double)(end_ns - begin_ns) / 1e9, events_before, reads_before, bytes_before, (double)own / 1e9);
    for (int i = 0; i < pids; i++) printf("%s%.6f", i ? ", " : "", (double)cpu[i] / 1e9);
    printf("]");
    print_quantiles("ttft", ttft);
    print_quantiles("latency", latency);
    printf("}\n");
    return 0;
}
