/* Prints the secrets of a login that its functions leave on their stack: scram PASSWORD SERVER_FIRST NAME=HEX…, or mysql
 * PASSWORD SCRAMBLE NAME=HEX…; then what the host is shown.
 *
 * They run in a thread whose stack is in memory of ours. A secret is looked for as it is and as the words of a hash in
 * the making, which have the machine's order of bytes.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "scram.h"
#include "scramble.h"

enum { STACK = 1 << 20 };

static struct scram_client client;
static struct str password, server_first;
static unsigned char by_native[NATIVE_ANSWER], by_sha2[SHA2_ANSWER];

static void *take(void *unused)
{
    (void)unused;
    scram_client_begin(&client, SCRAM_UNBOUND, NULL, "nonce");
    if (!scram_client_take(&client, server_first, password))
        exit(2);
    return NULL;
}

static void *derive(void *unused)
{
    (void)unused;
    while (!scram_client_derive(&client, 1000))
        ;
    return NULL;
}

static void *prove(void *unused)
{
    (void)unused;
    scram_client_prove(&client);
    return NULL;
}

static void *answer_natively(void *unused)
{
    (void)unused;
    native_answer(password, server_first.p, by_native);
    return NULL;
}

static void *answer_by_sha2(void *unused)
{
    (void)unused;
    sha2_answer(password, server_first.p, by_sha2);
    return NULL;
}

static void print_hex(const unsigned char *p, size_t n)
{
    while (n--)
        printf("%02x", *p++);
    printf("\n");
}

static bool print_if_left(const char *stack, const char *name, const char *hex)
{
    unsigned char secret[64], words[64];
    size_t n = strlen(hex) / 2;
    for (size_t k = 0; k < n; k++) {
        unsigned byte;
        if (n > sizeof secret || n % 4 || sscanf(hex + 2 * k, "%2x", &byte) != 1)
            return false;
        secret[k] = words[k - k % 4 + 3 - k % 4] = (unsigned char)byte;
    }
    if (memmem(stack, STACK, secret, n) || memmem(stack, STACK, words, n))
        printf("%.*s\n", (int)(hex - 1 - name), name);
    return true;
}

int main(int argc, char **argv)
{
    static void *(*const SCRAM_STEPS[])(void *) = {take, derive, prove};
    static void *(*const MYSQL_STEPS[])(void *) = {answer_natively, answer_by_sha2};
    char *stack = mmap(NULL, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (argc < 5 || stack == MAP_FAILED)
        return 2;
    bool mysql = strcmp(argv[1], "mysql") == 0;
    password = str_of(argv[2]);
    server_first = str_of(argv[3]);
    for (unsigned step = 0; step < (mysql ? 2 : 3); step++) {
        pthread_t thread;
        pthread_attr_t attributes;
        memset(stack, 0, STACK);
        if (pthread_attr_init(&attributes) || pthread_attr_setstack(&attributes, stack, STACK)
            || pthread_create(&thread, &attributes, mysql ? MYSQL_STEPS[step] : SCRAM_STEPS[step], NULL)
            || pthread_join(thread, NULL))
            return 2;
        for (int i = 4; i < argc; i++)
            if (!print_if_left(stack, argv[i], strchr(argv[i], '=') + 1))
                return 2;
    }
    if (mysql) {
        print_hex(by_native, sizeof by_native);
        print_hex(by_sha2, sizeof by_sha2);
    } else {
        printf("%.*s\n", (int)client.final.n, client.final.p);
    }
    return 0;
}
