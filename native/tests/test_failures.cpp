// A host that fails: the text stays the same, and nothing that was promised is lost.
#include "session_fixture.hpp"

#include <algorithm>
#include <string>

using namespace fixture;

// Every function of the host fails once, at every place of a generation, by its own sign and by an exception.
TEST(a_failing_host_never_changes_the_text) {
    const char * names[] = { "decode target", "decode draft", "seq_rm target", "seq_rm draft", "get_logits_ith",
                             "sampler_sample", "get_sampled_token_ith", "get_embeddings_nextn",
                             "get_embeddings_nextn_ith", "compute target", "compute draft", "state size",
                             "state save", "state load" };
    for (const auto & o : kinds()) {
        for (const char * name : names) {
            for (int nth : { 1, 2, 3, 5, 8 }) {
                for (bool throws : { false, true }) {
                    host          h(o);
                    mtp_session * s = h.open();
                    generation    g(h, s, prompt_of(9), 3, 200);
                    h.wrong.assign(220, false);
                    for (size_t p = 0; p < h.wrong.size(); p += 3) {
                        h.wrong[p] = true;
                    }
                    h.throws        = throws;
                    h.lenient       = true;
                    h.fail_in[name] = nth;
                    int failures    = 0;
                    while (g.text.size() < 80) {
                        const int status = g.try_next();
                        if (status == MTP_OK) {
                            continue;
                        }
                        ++failures;
                        CHECK(status == MTP_HOST || status == MTP_EXCEPTION || status == MTP_ROLLBACK);
                        CHECK(std::string(mtp_session_error(s)).size() > 4);
                        // What the adapter does: the text so far is evaluated again.
                        h.target.clear();
                        CHECK(mtp_forget(s, 0) == MTP_OK);
                        h.eval(s, { g.text.begin(), g.text.end() - 1 }, 0);
                    }
                    CHECK(failures <= 1);
                    CHECK(std::equal(g.text.begin(), g.text.end(), h.truth.begin()));
                    CHECK(h.faults() == "");
                    mtp_session_close(s, 1);
                    CHECK(h.n_chains_alive == 0);
                }
            }
        }
    }
}

// The chain of the user may throw (a grammar does): the row stays, and the same call may be made again.
TEST(a_throwing_sampler_leaves_the_row) {
    for (const auto & o : kinds()) {
        for (int32_t depth : { 0, 3 }) {
            for (int nth = 1; nth <= 6; ++nth) {
                host          h(o);
                mtp_session * s = h.open();
                generation    g(h, s, prompt_of(9), depth, 100);
                h.fail_in["sampler_sample"] = nth;
                for (int i = 1; i < nth; ++i) {
                    CHECK(g.try_next() == MTP_OK);
                }
                CHECK(g.try_next() == MTP_EXCEPTION);
                CHECK(g.try_next() == MTP_OK);
                g.run(60);
                CHECK(h.faults() == "");
                CHECK(h.n_samples == 50);
                mtp_session_close(s, 1);
            }
        }
    }
}

// The very first decode fails after its rows went in: an emptied target must really be empty.
TEST(a_failed_first_decode_can_be_cleared) {
    for (bool recurrent : { false, true }) {
        options o;
        o.recurrent = recurrent;
        host          h(o);
        mtp_session * s      = h.open();
        const auto    prompt = prompt_of(1);
        h.truth              = host::plain_text(prompt, 60);
        h.lenient            = true;
        mtp_step step{};
        h.fail_in["compute target"] = 1;
        CHECK(next(s, prompt[0], 0, rule_of(3, 0), step) == MTP_HOST);
        CHECK(mtp_truncate(s, 0) == MTP_OK);
        CHECK(h.target.end() == 0);
        CHECK(next(s, prompt[0], 0, rule_of(3, 0), step) == MTP_OK);
        CHECK(step.token == h.truth[1]);
        mtp_session_close(s, 1);
    }
}
