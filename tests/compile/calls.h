/* calls.h - calls something real in every module that this build keeps, so that a misspelt trigger or switch cannot pass.
   Returns 0, or the line of the first thing that went wrong. Include chaos.h first. */
#ifndef CALLS_H
#define CALLS_H

#define CALLS_NEED(condition) \
    if (!(condition)) return __LINE__

#ifdef CHAOS_NO_SSM
#define CALLS_SSM CHAOS_ERR_COMPILED_OUT
#else
#define CALLS_SSM CHAOS_ERR_ARGUMENT
#endif

static int calls_config(void) {
    static const char good[] = "{ \"enabled\": true, \"errorRate\": 100, \"errorStatus\": 503 }";
    static chaos_config config;
    char text[256];
    chaos_error error;
    chaos_request request;
    chaos_verdict verdict;
    CALLS_NEED(chaos_json_check("[1, 2]", 6, &error) == CHAOS_OK);
    CALLS_NEED(chaos_json_check("[1, 2", 5, &error) == CHAOS_ERR_JSON);
    CALLS_NEED(error.line == 1 && error.text[0]);
    CALLS_NEED(chaos_config_parse(&config, "{\"enabld\":true}", 15, &error) == CHAOS_ERR_UNKNOWN_KEY);
    CALLS_NEED(chaos_config_parse(&config, good, sizeof good - 1, &error) == CHAOS_OK);
    CALLS_NEED(chaos_config_format(&config, text, sizeof text) > 20 && text[0] == '{');
    request.method = "GET";
    request.path = "/calls";
    request.key = NULL;
    request.method_len = request.path_len = request.key_len = 0;
    request.header = NULL;
    request.user = NULL;
    request.id = NULL;
    request.delay_limit_us = 0;
    verdict = chaos_judge(&config, &request, 1);
    CALLS_NEED(verdict.kind == CHAOS_STATUS && verdict.status == 503);
    CALLS_NEED(chaos_kind_text(CHAOS_RESET)[0] == 'r');
    CALLS_NEED(chaos_state_text(CHAOS_STATE_KILLED)[0] == 'k');
    CALLS_NEED(chaos_result_text(CHAOS_ERR_JSON)[0] && chaos_version()[0] == CHAOS_VERSION[0]);
    return 0;
}

#ifdef CHAOS_COMPILE_OUT
/* Every injection point is there, typed, and does nothing. */
static int calls_handle(void) {
    chaos_error error;
    chaos_report report;
    char body[4];
    chaos *c = chaos_open(NULL, &error);
    chaos_verdict verdict = chaos_decide(c, NULL);
    CALLS_NEED(c && verdict.kind == CHAOS_PASS && !verdict.delay_us);
    chaos_wait(c, &verdict);
    chaos_done(c, &verdict, 200, 0);
    CALLS_NEED(chaos_verdict_body(c, &verdict, body, sizeof body) == 0);
    CALLS_NEED(chaos_verdict_retry_after(c, &verdict) == -1 && chaos_wake_fd(c) == -1);
    CALLS_NEED(chaos_refresh(c, &error) == CHAOS_ERR_COMPILED_OUT);
    CALLS_NEED(chaos_proxy_run(c, NULL, &error) == CHAOS_ERR_COMPILED_OUT);
    CALLS_NEED(chaos_ssm_get(NULL, body, sizeof body, NULL, &error) == CHAOS_ERR_COMPILED_OUT);
    CALLS_NEED(chaos_metrics(c, body, sizeof body) == 0 && body[0] == 0);
    CALLS_NEED(!chaos_get_config(c, NULL));
    chaos_stats(c, &report);
    CALLS_NEED(report.requests == 0);
    chaos_proxy_stop(c);
    chaos_off(c);
    chaos_close(c);
    return 0;
}
#else
static int calls_handle(void) {
    static chaos_desc desc; /* all zero */
    static chaos_config config;
    chaos_error error;
    chaos_report report;
    chaos_request request;
    chaos_verdict verdict;
    char body[256];
    chaos *c;
    desc.config = "{\"enabled\":true,\"errorRate\":100,\"errorStatus\":418,\"errorBody\":\"teapot\",\"retryAfter\":3}";
    desc.quiet = true;
    c = chaos_open(&desc, &error);
    CALLS_NEED(c);
    request.method = "GET";
    request.path = "/calls";
    request.key = NULL;
    request.method_len = request.path_len = request.key_len = 0;
    request.header = NULL;
    request.user = NULL;
    request.id = NULL;
    request.delay_limit_us = 0;
    verdict = chaos_decide(c, &request);
    CALLS_NEED(verdict.kind == CHAOS_STATUS && verdict.status == 418);
    chaos_wait(c, &verdict);
    CALLS_NEED(chaos_verdict_body(c, &verdict, body, sizeof body) == 6 && body[0] == 't');
    CALLS_NEED(chaos_verdict_retry_after(c, &verdict) == 3);
    chaos_done(c, &verdict, 0, 0);
    CALLS_NEED(chaos_metrics(c, body, sizeof body) > sizeof body && body[0] == '#');
    CALLS_NEED(chaos_get_config(c, &config) && config.enabled);
    chaos_stats(c, &report);
    CALLS_NEED(report.state == CHAOS_STATE_ON && report.injected[CHAOS_STATUS] == 1);
    CALLS_NEED(chaos_refresh(c, &error) == CHAOS_OK);
#ifndef CHAOS_NO_PROXY
    {
        static chaos_proxy_desc proxy;
        CALLS_NEED(chaos_proxy_run(c, &proxy, &error) != CHAOS_OK && error.text[0]); /* no upstream */
        proxy.upstream = "http://127.0.0.1:9";
        chaos_proxy_stop(c); /* before the run, so that it ends at once */
        CALLS_NEED(chaos_proxy_run(c, &proxy, &error) == CHAOS_OK);
    }
#endif
    {
        chaos_ssm_desc parameter = {"", NULL, NULL, NULL, 0}; /* no name */
        chaos_ssm_value value;
        CALLS_NEED(chaos_ssm_get(&parameter, body, sizeof body, &value, &error) == CALLS_SSM && error.text[0]);
        CALLS_NEED(chaos_ssm_put(&parameter, "{}", 2, &value, &error) == CALLS_SSM);
        CALLS_NEED(chaos_ssm_list(NULL, body, sizeof body, &value, NULL) == CALLS_SSM);
    }
    (void)chaos_wake_fd(c); /* -1 where there is none */
    chaos_off(c);
    verdict = chaos_decide(c, &request);
    CALLS_NEED(verdict.kind == CHAOS_PASS);
    chaos_stats(c, &report);
    CALLS_NEED(report.state == CHAOS_STATE_KILLED);
    chaos_close(c);
    return 0;
}
#endif

static int calls(void) {
    int line = calls_config();
    return line ? line : calls_handle();
}

#endif
