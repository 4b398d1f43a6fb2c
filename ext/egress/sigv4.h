/* AWS Signature Version 4: replaces a signature that the guest made with a placeholder key by one with the real key.
 *
 * The guest's signature says what is signed (which fields, which payload) and with which key, region and service; the
 * rule says which of these are its. All else is computed again from the request as it leaves, with the time of the
 * host, so that a guest can neither get a signature for what is not sent nor keep one for later.
 *
 *   form       Authorization, or the parameters of a presigned URL
 *   payload    a hash that the guest gives in x-amz-content-sha256, UNSIGNED-PAYLOAD, or the body's, for which it must be
 *              complete; of aws-chunked bodies each chunk's signature, and the trailer's, is replaced in place
 *
 * Specification: "Signature Version 4 signing process" in the AWS General Reference, "Authenticating Requests" in the
 * Amazon S3 API Reference.
 */
#ifndef HYPEMAN_EGRESS_SIGV4_H
#define HYPEMAN_EGRESS_SIGV4_H

#include "verdict.h"

/* A rule's extra texts; `value` is the secret key. */
enum { SIGV4_KEY_ID, SIGV4_TOKEN, SIGV4_REGION, SIGV4_SERVICE, SIGV4_EXTRA };

/* Whether the body must be complete to sign the request. */
bool sigv4_needs_body(const struct head *h, struct str path);
/* `room` gets what the request is given, `work` is overwritten. `body`: all of it, or NULL if it need not be complete;
 * changed in place. A request without a signature passes as it is. R_SIGNATURE, with m->detail, if the signature cannot
 * be replaced. */
enum reason sigv4_sign(struct out *room, struct out *work, struct matched *m, const struct head *h,
                       const struct destination *to, struct str path, char *body, size_t n, int64_t now_s);

#endif
