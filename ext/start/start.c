/* The program `hypeman` of the appliance: starts the bundled Python on the bundled C library.
 *
 * The bundle needs a newer C library than many hosts have, so it brings one, and with it the dynamic loader that belongs to
 * it. No file name in an ELF file is relative to that file, so the kernel cannot be told where that loader is. This program
 * finds it beside itself, maps it, and jumps to it with the arguments
 *
 *     LOADER --inhibit-cache --argv0 NAME --library-path _internal _internal/bootloader arguments…
 *
 * It does not execute the loader: /proc/self/exe, the process's name and its command line in /proc would then be the
 * loader's, and the program would start itself again by the wrong file. Nor is the path inherited by other programs,
 * as LD_LIBRARY_PATH would be. LD_PRELOAD and LD_AUDIT name the host's libraries, for the host's C library.
 *
 * Two variables tell PyInstaller's bootloader that it was started with its libraries in the path: otherwise it sets
 * LD_LIBRARY_PATH and executes this file a second time. Its archive is a section of this file. `clean_environment.py` removes
 * them again.
 */

#define _GNU_SOURCE
#include <alloca.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined __x86_64__
#define LOADER "ld-linux-x86-64.so.2"
#define JUMP "mov %0, %%rsp; xor %%edx, %%edx; jmp *%1"
#define JUMP_CLOBBERS "rdx", "memory"
#elif defined __aarch64__
#define LOADER "ld-linux-aarch64.so.1"
#define JUMP "mov sp, %0; mov x0, #0; br %1"
#define JUMP_CLOBBERS "x0", "memory"
#else
#error "the start of a loader is not written for this architecture"
#endif

#define MAX_SEGMENTS 16

static _Noreturn void fail(const char *what)
{
    fprintf(stderr, "hypeman: %s: %s\n", what, strerror(errno));
    _exit(127);
}

struct loader {
    uintptr_t base, entry, headers;
    size_t header_count;
};

/* Maps a segment of `fd`, and clears what the file does not have, to the end of its last page: as the kernel does, and
 * as the loader relies on, whose first allocations are there. */
static void map_segment(int fd, uintptr_t base, const Elf64_Phdr *segment, size_t page, const char *path)
{
    int protection = (segment->p_flags & PF_R ? PROT_READ : 0) | (segment->p_flags & PF_W ? PROT_WRITE : 0)
        | (segment->p_flags & PF_X ? PROT_EXEC : 0);
    uintptr_t begin = base + segment->p_vaddr, first = begin & -page;
    uintptr_t file_end = begin + segment->p_filesz, end = begin + segment->p_memsz;
    uintptr_t file_pages_end = (file_end + page - 1) & -page;
    size_t before = begin - first;
    if (mmap((void *)first, segment->p_filesz + before, protection, MAP_PRIVATE | MAP_FIXED, fd,
             (off_t)(segment->p_offset - before))
        == MAP_FAILED)
        fail(path);
    if (end <= file_end)
        return;
    memset((void *)file_end, 0, file_pages_end - file_end);
    if (end > file_pages_end
        && mmap((void *)file_pages_end, end - file_pages_end, protection, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1,
                0)
            == MAP_FAILED)
        fail(path);
}

static struct loader map_loader(const char *path, size_t page)
{
    Elf64_Ehdr head;
    Elf64_Phdr segments[MAX_SEGMENTS];
    size_t span = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        fail(path);
    errno = ENOEXEC;
    if (pread(fd, &head, sizeof head, 0) != (ssize_t)sizeof head || memcmp(head.e_ident, ELFMAG, SELFMAG) != 0
        || head.e_type != ET_DYN || head.e_phentsize != sizeof *segments || head.e_phnum > MAX_SEGMENTS)
        fail(path);
    ssize_t length = (ssize_t)(head.e_phnum * sizeof *segments);
    if (pread(fd, segments, (size_t)length, (off_t)head.e_phoff) != length)
        fail(path);
    for (int i = 0; i < head.e_phnum; i++)
        if (segments[i].p_type == PT_LOAD)
            span = segments[i].p_vaddr + segments[i].p_memsz; /* they are in the order of their addresses */
    void *place = mmap(NULL, span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (place == MAP_FAILED)
        fail(path);
    for (int i = 0; i < head.e_phnum; i++)
        if (segments[i].p_type == PT_LOAD)
            map_segment(fd, (uintptr_t)place, &segments[i], page, path);
    close(fd);
    uintptr_t base = (uintptr_t)place;
    return (struct loader){base, base + head.e_entry, base + head.e_phoff, head.e_phnum};
}

static int begins(const char *text, const char *start)
{
    return strncmp(text, start, strlen(start)) == 0;
}

/* Whether a variable of the caller's is passed on. */
static int is_passed_on(const char *variable)
{
    return !begins(variable, "_PYI_") && !begins(variable, "LD_PRELOAD=") && !begins(variable, "LD_AUDIT=");
}

/* What the kernel says of this program, said of the loader as if the kernel had started that. */
static Elf64_auxv_t about_loader(Elf64_auxv_t entry, const struct loader *loader)
{
    switch (entry.a_type) {
    case AT_PHDR:
        entry.a_un.a_val = loader->headers;
        break;
    case AT_PHNUM:
        entry.a_un.a_val = loader->header_count;
        break;
    case AT_ENTRY:
        entry.a_un.a_val = loader->entry;
        break;
    case AT_BASE:
        entry.a_un.a_val = 0;
        break;
    }
    return entry;
}

int main(int argc, char **argv, char **environment)
{
    static char self[PATH_MAX], directory[PATH_MAX], loader_path[PATH_MAX], program[PATH_MAX];
    static char archive[PATH_MAX + 32], level[] = "_PYI_PARENT_PROCESS_LEVEL=-1";
    ssize_t length = readlink("/proc/self/exe", self, sizeof self - 64); /* room for the names below */
    if (length < 0)
        fail("/proc/self/exe");
    char *slash = memrchr(self, '/', (size_t)length);
    if (slash == NULL)
        fail(self);
    int parent = (int)(slash - self);
    *slash = 0;
    if (strpbrk(self, ":;") != NULL) { /* which separate the directories of --library-path */
        errno = EINVAL;
        fail(self);
    }
    *slash = '/';
    snprintf(archive, sizeof archive, "_PYI_ARCHIVE_FILE=%s", self);
    snprintf(directory, sizeof directory, "%.*s/_internal", parent, self);
    snprintf(loader_path, sizeof loader_path, "%.*s/_internal/" LOADER, parent, self);
    snprintf(program, sizeof program, "%.*s/_internal/bootloader", parent, self);

    char **variable = environment;
    while (*variable != NULL)
        variable++;
    Elf64_auxv_t *known = (Elf64_auxv_t *)(void *)(variable + 1), *entry = known;
    size_t page = 4096;
    for (; entry->a_type != AT_NULL; entry++)
        if (entry->a_type == AT_PAGESZ)
            page = entry->a_un.a_val;
    struct loader loader = map_loader(loader_path, page);

    char *const words[] = {
        loader_path, "--inhibit-cache", "--argv0", argc > 0 ? argv[0] : self, "--library-path", directory, program,
    };
    size_t word_count = sizeof words / sizeof *words;
    size_t variables = (size_t)(variable - environment), rest = argc > 0 ? (size_t)argc - 1 : 0;
    /* argc, words, arguments, NULL, variables, two of ours, NULL; then pairs. The stack begins at a multiple of 16. */
    size_t size = 1 + word_count + rest + 1 + variables + 2 + 1 + 2 * (size_t)(entry - known + 1);
    uintptr_t *stack = alloca((size + 2) * sizeof *stack);
    stack = (uintptr_t *)(((uintptr_t)stack + 15) & ~(uintptr_t)15);
    uintptr_t *next = stack;
    *next++ = word_count + rest;
    for (size_t i = 0; i < word_count; i++)
        *next++ = (uintptr_t)words[i];
    for (size_t i = 0; i < rest; i++)
        *next++ = (uintptr_t)argv[i + 1];
    *next++ = 0;
    for (size_t i = 0; i < variables; i++)
        if (is_passed_on(environment[i]))
            *next++ = (uintptr_t)environment[i];
    *next++ = (uintptr_t)archive;
    *next++ = (uintptr_t)level;
    *next++ = 0;
    for (entry = known;; entry++) {
        Elf64_auxv_t said = about_loader(*entry, &loader);
        *next++ = said.a_type;
        *next++ = said.a_un.a_val;
        if (said.a_type == AT_NULL)
            break;
    }
    __asm__ volatile(JUMP : : "r"(stack), "r"(loader.entry) : JUMP_CLOBBERS);
    __builtin_unreachable();
}
