// Counts words: runs of ASCII letters, digits and underscores, case matters.
//
// The files named in MESHD_ITEM, one path a line, are counted into counts.txt, as lines
// "count word" sorted by word. Without an item it counts stdin onto stdout:
//
//     python -m ziglang cc -target wasm32-wasi -O2 -s -o wordcount.wasm examples/wordcount.c
//     mesh run wordcount.wasm < book.txt
#include "words.h"

static unsigned char is_word[256];

// The beginning of a word that the end of a buffer has cut; of any length.
typedef struct {
    char *text;
    size_t length, room;
} Cut;

static void extend(Cut *cut, const unsigned char *part, size_t length) {
    if (cut->length + length > cut->room) {
        cut->room = (cut->length + length) * 2;
        cut->text = need(realloc(cut->text, cut->room));
    }
    memcpy(cut->text + cut->length, part, length);
    cut->length += length;
}

static void add(Words *words, const char *word, size_t length) {
    add_word(words, word, (uint32_t)length, hash_word(word, length), 1);
}

static void finish(Cut *cut, Words *words) {
    if (cut->length) add(words, cut->text, cut->length);
    cut->length = 0;
}

static void count(FILE *from, const char *name, Words *words) {
    static unsigned char buffer[1 << 16];
    static Cut cut;
    size_t n;
    while ((n = fread(buffer, 1, sizeof buffer, from)) > 0) {
        size_t at = 0;
        while (at < n) {
            size_t start = at;
            while (at < n && is_word[buffer[at]]) at++;
            if (at == n || cut.length) // the word goes on in the next buffer, or began in the last one
                extend(&cut, buffer + start, at - start);
            else if (at > start)
                add(words, (char *)buffer + start, at - start);
            if (at < n) {
                finish(&cut, words);
                while (at < n && !is_word[buffer[at]]) at++;
            }
        }
    }
    if (ferror(from)) {
        perror(name);
        exit(1);
    }
    finish(&cut, words); // a word does not go on in the next file
}

static FILE *open_or_die(const char *path, const char *mode) {
    FILE *file = fopen(path, mode);
    if (!file) {
        perror(path);
        exit(1);
    }
    return file;
}

int main(void) {
    Words words = {0};
    for (int c = 0; c < 256; c++)
        is_word[c] = c == '_' || (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    const char *item = getenv("MESHD_ITEM");
    if (!item || !*item) {
        count(stdin, "stdin", &words);
        write_words(&words, stdout, "stdout", by_word);
        return 0;
    }
    char *paths = need(strdup(item));
    for (char *path = strtok(paths, "\n"); path; path = strtok(NULL, "\n")) {
        FILE *file = open_or_die(path, "rb");
        count(file, path, &words);
        fclose(file);
    }
    write_words(&words, open_or_die("counts.txt", "wb"), "counts.txt", by_word);
    return 0;
}
