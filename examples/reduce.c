// Adds up word counts: every file below a directory (the first argument, or "counts"), as wordcount.c
// writes them, goes into total.txt, as lines "count word" sorted by count, the largest first, then by word.
#include "words.h"

#include <dirent.h>
#include <errno.h>
#include <sys/stat.h>

enum { PATH_MAX_ = 4096 };

static void fail(const char *path, const char *why) {
    fprintf(stderr, "%s: %s\n", path, why);
    exit(1);
}

// One line "count word", without its newline.
static void add_line(Words *words, const char *path, const char *line, size_t length) {
    uint64_t count = 0;
    size_t at = 0;
    for (; at < length && line[at] >= '0' && line[at] <= '9'; at++) {
        if (count > (UINT64_MAX - 9) / 10) fail(path, "a count is too large");
        count = count * 10 + (uint64_t)(line[at] - '0');
    }
    if (at == 0 || at + 1 >= length || line[at] != ' ') fail(path, "not lines of \"count word\"");
    const char *word = line + at + 1;
    add_word(words, word, (uint32_t)(length - at - 1), hash_word(word, length - at - 1), count);
}

static void add_file(Words *words, const char *path) {
    FILE *file = fopen(path, "rb");
    if (!file) fail(path, strerror(errno));
    static char buffer[1 << 16];
    setvbuf(file, buffer, _IOFBF, sizeof buffer);
    char *line = NULL;
    size_t room = 0;
    ssize_t length;
    while ((length = getline(&line, &room, file)) > 0) {
        if (line[length - 1] == '\n') length--;
        add_line(words, path, line, (size_t)length);
    }
    if (ferror(file)) fail(path, strerror(errno));
    free(line);
    fclose(file);
}

static void walk(Words *words, const char *directory) {
    DIR *dir = opendir(directory);
    if (!dir) fail(directory, strerror(errno));
    for (struct dirent *entry; (entry = readdir(dir));) {
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, "..")) continue;
        char path[PATH_MAX_];
        struct stat found;
        int length = snprintf(path, sizeof path, "%s/%s", directory, entry->d_name);
        if (length < 0 || (size_t)length >= sizeof path) fail(directory, "a path below it is too long");
        if (lstat(path, &found)) fail(path, strerror(errno));
        if (S_ISDIR(found.st_mode)) walk(words, path);
        if (S_ISREG(found.st_mode)) add_file(words, path);
    }
    closedir(dir);
}

int main(int argc, char **argv) {
    Words words = {0};
    walk(&words, argc > 1 ? argv[1] : "counts");
    FILE *total = fopen("total.txt", "wb");
    if (!total) fail("total.txt", strerror(errno));
    write_words(&words, total, "total.txt", by_count);
    return 0;
}
