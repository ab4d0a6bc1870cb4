/* metrics.c - the Prometheus text: every counter is in it, labels are escaped, buffers of any size hold. That a real parser
   takes it is the job of tests/peers/admin.py. */
#define CHAOS_IMPLEMENTATION
#include "../../chaos.h"
#include "../check.h"

#define LINES (CHAOSI_WORDS + 80)

static char text[16384];

/* The value of a sample, as written; NULL = not there, "twice" = more than once. */
static const char *sample(const char *name) {
    static char value[64];
    const char *p = text, *found = NULL;
    for (; *p; p = strchr(p, '\n') + 1) {
        if (strncmp(p, name, strlen(name)) || p[strlen(name)] != ' ') continue;
        if (found) return "twice";
        found = p + strlen(name) + 1;
    }
    if (found) snprintf(value, sizeof value, "%.*s", (int)strcspn(found, "\n"), found);
    return found ? value : NULL;
}

static void write_report(const chaos_report *r) {
    size_t n = chaosi_metrics(r, "svc", "i-1", text, sizeof text);
    CHECK(n < sizeof text);
    CHECK_INT(n, strlen(text));
}

/* A number in one field must come out, whatever field it is: a counter added to the report cannot be forgotten here. */
static void check_field(size_t at, const char *name) {
    static chaos_report r;
    const long long mark = 7777777;
    memset(&r, 0, sizeof r);
    memcpy((char *)&r + at, &mark, sizeof mark);
    write_report(&r);
    check_where("%s", name);
    CHECK(strstr(text, " 7777777.0\n") || strstr(text, " 7777.777\n") || strstr(text, " 7.777777\n"));
}

static void case_every_field_is_in_it(void) {
    size_t at;
    char name[32];
#define FIELD(name) check_field(offsetof(chaos_report, name), #name)
    FIELD(version), FIELD(age_ms), FIELD(end_ms), FIELD(fetches), FIELD(fetch_errors), FIELD(config_errors), FIELD(config_changes);
    FIELD(waiting), FIELD(connections_now), FIELD(log_suppressed);
    for (at = offsetof(chaos_report, requests); at < sizeof(chaos_report); at += sizeof(unsigned long long)) {
        if (at == offsetof(chaos_report, injected)) continue; /* [CHAOS_PASS] stays 0 */
        snprintf(name, sizeof name, "word %d", (int)((at - offsetof(chaos_report, requests)) / sizeof(unsigned long long)));
        check_field(at, name);
    }
}

static void case_names_and_units(void) {
    static chaos_report r;
    r.state = CHAOS_STATE_DRY_RUN;
    r.version = 18;
    r.age_ms = 1500;
    r.end_ms = 1800000000123;
    r.requests = 1234567890123456789;
    r.injected[CHAOS_DELAY] = 2;
    r.injected[CHAOS_CORRUPT] = 9;
    r.excluded = 3;
    r.over_budget = 4;
    r.unsupported = 5;
    r.delay_ms = 60001;
    r.outcomes[0] = 6;
    r.outcomes[5] = 7;
    r.outcome_us = 1000001;
    r.capped_ms = 8;
    write_report(&r);
    CHECK_STR(sample("chaos_info{version=\"" CHAOS_VERSION "\",service=\"svc\",instance=\"i-1\"}"), "1");
    CHECK_STR(sample("chaos_state{state=\"dry-run\"}"), "1.0");
    CHECK_STR(sample("chaos_state{state=\"on\"}"), "0.0");
    CHECK_STR(sample("chaos_config_version"), "18.0");
    CHECK_STR(sample("chaos_config_age_seconds"), "1.500");
    CHECK_STR(sample("chaos_end_timestamp_seconds"), "1800000000.123");
    CHECK_STR(sample("chaos_requests_total"), "1234567890123456789.0");
    CHECK_STR(sample("chaos_injected_total{kind=\"latency\"}"), "2.0");
    CHECK_STR(sample("chaos_injected_total{kind=\"corrupt\"}"), "9.0");
    CHECK(!sample("chaos_injected_total{kind=\"pass\"}"));
    CHECK_STR(sample("chaos_spared_total{reason=\"exclude\"}"), "3.0");
    CHECK_STR(sample("chaos_spared_total{reason=\"budget\"}"), "4.0");
    CHECK_STR(sample("chaos_spared_total{reason=\"unsupported\"}"), "5.0");
    CHECK_STR(sample("chaos_delay_seconds_total"), "60.001");
    CHECK_STR(sample("chaos_outcomes_total{status=\"other\"}"), "6.0");
    CHECK_STR(sample("chaos_outcomes_total{status=\"5xx\"}"), "7.0");
    CHECK_STR(sample("chaos_outcome_seconds_total"), "1.000001");
    CHECK_STR(sample("chaos_capped_seconds_total"), "0.008");
    r.age_ms = -1; /* not known: no sample, rather than a wrong one */
    r.end_ms = 0;
    write_report(&r);
    CHECK(!sample("chaos_config_age_seconds"));
    CHECK(!sample("chaos_end_timestamp_seconds"));
}

static void case_one_state_of_all(void) {
    static chaos_report r;
    char name[64];
    int state, other;
    for (state = 0; state < CHAOS_STATE_COUNT; state++) {
        r.state = (chaos_state)state;
        write_report(&r);
        for (other = 0; other < CHAOS_STATE_COUNT; other++) {
            snprintf(name, sizeof name, "chaos_state{state=\"%s\"}", chaos_state_text((chaos_state)other));
            CHECK_STR(sample(name), state == other ? "1.0" : "0.0");
        }
    }
}

/* Lines end with \n, the last too; HELP, then TYPE, then the samples of that family; each family once; counters in _total. */
static void case_form(void) {
    static chaos_report r;
    char family[64] = "", seen[LINES][64], type[16];
    int families = 0, i;
    const char *p;
    r.end_ms = 1;
    write_report(&r);
    CHECK(text[strlen(text) - 1] == '\n');
    for (p = text; *p; p = strchr(p, '\n') + 1) {
        check_where("%.*s", (int)strcspn(p, "\n"), p);
        if (!strncmp(p, "# HELP ", 7)) {
            CHECK(sscanf(p, "# HELP %63s", family) == 1);
            for (i = 0; i < families; i++) CHECK(strcmp(seen[i], family));
            memcpy(seen[families++], family, sizeof family);
            p = strchr(p, '\n') + 1;
            CHECK(!strncmp(p, "# TYPE ", 7) && !strncmp(p + 7, family, strlen(family)));
            CHECK(sscanf(p, "# TYPE %*s %15s", type) == 1);
            CHECK_STR(type, strstr(family, "_total") ? "counter" : "gauge");
        } else {
            CHECK(!strncmp(p, family, strlen(family)) && strchr(" {", p[strlen(family)]));
        }
    }
    CHECK(families >= 27);
}

static void case_labels_are_escaped(void) {
    static const char *const rows[][2] = {
        {"", ""},
        {"plain-1.2_3", "plain-1.2_3"},
        {"a\"b", "a\\\"b"},
        {"a\\b", "a\\\\b"},
        {"a\nb", "a\\nb"},
        {"\\\"\n", "\\\\\\\"\\n"},
        {"{},= \t", "{},= \t"},
        {"caf\xc3\xa9 \xe2\x82\xac", "caf\xc3\xa9 \xe2\x82\xac"},
        {"bad \xff\xc3", "bad ??"},
    };
    static chaos_report r;
    size_t i;
    for (i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        char want[128];
        check_where("row %d", (int)i);
        CHECK(chaosi_metrics(&r, rows[i][0], rows[i][0], text, sizeof text) < sizeof text);
        snprintf(want, sizeof want, "\nchaos_info{version=\"%s\",service=\"%s\",instance=\"%s\"} 1\n", CHAOS_VERSION, rows[i][1],
                 rows[i][1]);
        CHECK(strstr(text, want) != NULL);
    }
}

/* Every size: the same length is told, the text is a prefix, and not a byte is written beyond. */
static void case_cut_buffers(void) {
    static char cut[sizeof text + 1];
    static chaos_report r;
    size_t whole, cap;
    write_report(&r);
    whole = strlen(text);
    for (cap = 0; cap <= whole + 2; cap++) {
        size_t want = cap == 0 ? 0 : cap <= whole ? cap - 1 : whole;
        memset(cut, 0x55, sizeof cut);
        CHECK_INT(chaosi_metrics(&r, "svc", "i-1", cut, cap), whole);
        if (cap) CHECK(!memcmp(cut, text, want) && cut[want] == 0);
        CHECK(cut[cap] == 0x55);
    }
    CHECK_INT(chaosi_metrics(&r, "svc", "i-1", NULL, 0), whole);
}

static void case_without_a_handle_it_is_off(void) {
    size_t n = chaos_metrics(NULL, text, sizeof text);
    CHECK_INT(n, strlen(text));
    CHECK_STR(sample("chaos_state{state=\"off\"}"), "1.0");
    CHECK_STR(sample("chaos_info{version=\"" CHAOS_VERSION "\",service=\"\",instance=\"\"}"), "1");
    CHECK_STR(sample("chaos_requests_total"), "0.0");
    CHECK(!sample("chaos_config_age_seconds"));
    CHECK_INT(chaos_metrics(NULL, NULL, 0), n);
}

static void case_agrees_with_the_handle(void) {
    chaos_desc d;
    chaos_report r;
    char want[32];
    chaos *c;
    int i;
    memset(&d, 0, sizeof d);
    d.config = "{\"enabled\":true,\"errorRate\":50,\"expiresAt\":4000000000}";
    d.instance = "one \"two\"";
    d.service = "pay";
    d.quiet = true;
    c = chaos_open(&d, NULL);
    for (i = 0; i < 1000; i++) {
        chaos_verdict v = chaos_decide(c, NULL);
        chaos_done(c, &v, v.kind ? 0 : 204, 10);
    }
    chaos_stats(c, &r);
    CHECK(chaos_metrics(c, text, sizeof text) < sizeof text);
    CHECK_STR(sample("chaos_info{version=\"" CHAOS_VERSION "\",service=\"pay\",instance=\"one \\\"two\\\"\"}"), "1");
    CHECK_STR(sample("chaos_state{state=\"on\"}"), "1.0");
    CHECK_STR(sample("chaos_requests_total"), "1000.0");
    CHECK_STR(sample("chaos_end_timestamp_seconds"), "4000000000.000");
    snprintf(want, sizeof want, "%llu.0", r.injected[CHAOS_STATUS]);
    CHECK_STR(sample("chaos_injected_total{kind=\"error\"}"), want);
    snprintf(want, sizeof want, "%llu.0", r.outcomes[2]);
    CHECK_STR(sample("chaos_outcomes_total{status=\"2xx\"}"), want);
    CHECK_STR(sample("chaos_outcome_seconds_total"), "0.010000");
    chaos_off(c);
    chaos_metrics(c, text, sizeof text);
    CHECK_STR(sample("chaos_state{state=\"killed\"}"), "1.0");
    CHECK_STR(sample("chaos_state{state=\"on\"}"), "0.0");
    chaos_close(c);
}

int main(int argc, char **argv) {
    check_begin(argc, argv);
    CHECK_RUN(case_every_field_is_in_it);
    CHECK_RUN(case_names_and_units);
    CHECK_RUN(case_one_state_of_all);
    CHECK_RUN(case_form);
    CHECK_RUN(case_labels_are_escaped);
    CHECK_RUN(case_cut_buffers);
    CHECK_RUN(case_without_a_handle_it_is_off);
    CHECK_RUN(case_agrees_with_the_handle);
    return check_end();
}
