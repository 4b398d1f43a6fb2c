/* How llhttp, strict, reads a message: a second parser for egress_fuzz.c. In a file of its own because names clash. */
#ifndef LLHTTP_OPINION_H
#define LLHTTP_OPINION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct opinion {
    bool refused;
    bool unknown;       /* a method that it does not know, or HTTP/2's preface */
    bool odd_target;    /* it looks at the target while it parses */
    bool head, message; /* complete */
    bool chunked, length;
    unsigned major, minor, status;
    size_t fields;
    const char *method;
    uint64_t sum; /* of the body: 5381, then * 33 + each byte */
};

/* Of a[0..n) and then b[0..m). */
struct opinion llhttp_opinion(bool response, const char *a, size_t n, const char *b, size_t m);

#endif
