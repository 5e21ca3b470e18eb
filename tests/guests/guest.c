// One guest for all tests: the first argument says what to do. meshd/testing/backend_suite.py lists the verbs.
#include <dirent.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

extern char **environ;

static int copy(FILE *from, FILE *to) {
    char buffer[65536];
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, from)) > 0)
        if (fwrite(buffer, 1, n, to) != n) return 1;
    return fflush(to) != 0;
}

static int fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    return 1;
}

static volatile unsigned counter;
static char *volatile block;

static int recurse(int depth) {
    volatile char frame[512];
    frame[0] = (char)depth;
    return depth < 0 ? 0 : recurse(depth + 1) + frame[0];
}

int main(int argc, char **argv) {
    const char *verb = argc > 1 ? argv[1] : "";
    if (!strcmp(verb, "exit")) exit(atoi(argv[2]));
    if (!strcmp(verb, "say")) {
        printf("%s", argv[2]);
        fprintf(stderr, "%s", argv[3]);
        return 0;
    }
    if (!strcmp(verb, "args")) {
        for (int i = 2; i < argc; i++) printf("%s\n", argv[i]);
        return 0;
    }
    if (!strcmp(verb, "env")) {
        const char *value = getenv(argv[2]);
        printf("%s", value ? value : "(unset)");
        return 0;
    }
    if (!strcmp(verb, "environ")) {
        for (char **entry = environ; *entry; entry++) printf("%s\n", *entry);
        return 0;
    }
    if (!strcmp(verb, "cat")) return copy(stdin, stdout);
    if (!strcmp(verb, "copy")) {
        FILE *from = fopen(argv[2], "rb");
        if (!from) return fail(argv[2]);
        FILE *to = fopen(argv[3], "wb");
        if (!to) return fail(argv[3]);
        return copy(from, to);
    }
    if (!strcmp(verb, "ls")) {
        DIR *dir = opendir(argv[2]);
        if (!dir) return fail(argv[2]);
        for (struct dirent *entry; (entry = readdir(dir));) printf("%s\n", entry->d_name);
        return 0;
    }
    if (!strcmp(verb, "symlink")) return symlink(argv[2], argv[3]) ? fail(argv[3]) : 0;
    if (!strcmp(verb, "spin"))
        for (;;) counter++;
    if (!strcmp(verb, "sleep")) {
        double s = atof(argv[2]);
        sleep((unsigned)s);
        usleep((useconds_t)((s - (unsigned)s) * 1e6));
        return 0;
    }
    if (!strcmp(verb, "flood")) {
        static char line[65536];
        memset(line, 'a', sizeof line);
        FILE *to = argc > 2 && !strcmp(argv[2], "stderr") ? stderr : stdout;
        for (;;) fwrite(line, 1, sizeof line, to);
    }
    if (!strcmp(verb, "write")) {
        size_t left = strtoull(argv[3], 0, 10);
        static char line[65536];
        FILE *to = fopen(argv[2], "wb");
        if (!to) return fail(argv[2]);
        for (; left; left -= left < sizeof line ? left : sizeof line)
            if (!fwrite(line, 1, left < sizeof line ? left : sizeof line, to)) return fail(argv[2]);
        return fclose(to) ? fail(argv[2]) : 0;
    }
    if (!strcmp(verb, "grow"))
        for (;;) {
            block = malloc(1 << 20);
            if (!block) return 3;
            memset(block, 1, 1 << 20);
        }
    if (!strcmp(verb, "trap")) __builtin_trap();
    if (!strcmp(verb, "recurse")) return recurse(1) > 5;
    fprintf(stderr, "unknown verb '%s'\n", verb);
    return 2;
}
