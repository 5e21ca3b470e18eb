// A table from words to counts: open addressing, words packed one after the other.
#ifndef WORDS_H
#define WORDS_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *word;
    uint32_t length, hash;
    uint64_t count;
} Entry;

typedef struct {
    Entry *entries;
    size_t slots, used; // slots is a power of two, at least half of them free
    char *chunk;        // where the next new word goes
    size_t chunk_left;
} Words;

enum { CHUNK = 1 << 16, FIRST_SLOTS = 1 << 12 };

static void *need(void *memory) {
    if (!memory) {
        fputs("out of memory\n", stderr);
        exit(1);
    }
    return memory;
}

static uint32_t hash_word(const char *word, size_t length) { // FNV-1a
    uint32_t hash = 2166136261u;
    for (size_t i = 0; i < length; i++) hash = (hash ^ (unsigned char)word[i]) * 16777619u;
    return hash;
}

static Entry *find_slot(Entry *entries, size_t slots, const char *word, uint32_t length, uint32_t hash) {
    size_t at = (hash ^ (hash >> 15)) & (slots - 1);
    while (entries[at].word && (entries[at].hash != hash || entries[at].length != length ||
                                memcmp(entries[at].word, word, length)))
        at = (at + 1) & (slots - 1);
    return &entries[at];
}

static void grow(Words *words) {
    size_t slots = words->slots ? words->slots * 2 : FIRST_SLOTS;
    Entry *entries = need(calloc(slots, sizeof *entries));
    for (size_t i = 0; i < words->slots; i++) {
        Entry *old = &words->entries[i];
        if (old->word) *find_slot(entries, slots, old->word, old->length, old->hash) = *old;
    }
    free(words->entries);
    words->entries = entries;
    words->slots = slots;
}

static const char *keep(Words *words, const char *word, uint32_t length) {
    if (length > words->chunk_left) {
        words->chunk_left = length > CHUNK ? length : CHUNK;
        words->chunk = need(malloc(words->chunk_left));
    }
    char *kept = words->chunk;
    memcpy(kept, word, length);
    words->chunk += length;
    words->chunk_left -= length;
    return kept;
}

static void add_word(Words *words, const char *word, uint32_t length, uint32_t hash, uint64_t count) {
    if (words->used * 2 >= words->slots) grow(words);
    Entry *entry = find_slot(words->entries, words->slots, word, length, hash);
    if (!entry->word) {
        *entry = (Entry){keep(words, word, length), length, hash, 0};
        words->used++;
    }
    entry->count += count;
}

static int by_word(const void *left, const void *right) {
    const Entry *a = left, *b = right;
    uint32_t shared = a->length < b->length ? a->length : b->length;
    int order = memcmp(a->word, b->word, shared);
    return order ? order : (a->length > b->length) - (a->length < b->length);
}

static int by_count(const void *left, const void *right) {
    const Entry *a = left, *b = right;
    if (a->count != b->count) return a->count < b->count ? 1 : -1;
    return by_word(left, right);
}

// A host call costs microseconds, and stdio makes one for every KiB unless it is given more room.
static void buffer_output(FILE *file) {
    static char room[1 << 16];
    setvbuf(file, room, _IOFBF, sizeof room);
}

// Sorts the table in place: nothing can be added afterwards.
static void write_words(Words *words, FILE *to, const char *name, int (*order)(const void *, const void *)) {
    size_t n = 0;
    buffer_output(to);
    for (size_t i = 0; i < words->slots; i++)
        if (words->entries[i].word) words->entries[n++] = words->entries[i];
    qsort(words->entries, n, sizeof *words->entries, order);
    for (size_t i = 0; i < n; i++) {
        fprintf(to, "%llu ", (unsigned long long)words->entries[i].count);
        fwrite(words->entries[i].word, 1, words->entries[i].length, to);
        putc('\n', to);
    }
    if (fflush(to) || ferror(to)) {
        perror(name);
        exit(1);
    }
}

#endif
