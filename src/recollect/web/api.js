/**
 * Calls of the server's public API, with the key of this tab where there is one.
 *
 * Knows nothing of what is shown. A failed call throws an `ApiError` with the server's own sentence.
 */

import { signal } from "@preact/signals";
import { fetchEventSource } from "@microsoft/fetch-event-source";

const KEY = "recollect-key";
const UNREACHED = "The server cannot be reached: see whether it still runs.";
/** What a header can carry; a browser sends no request with anything else. */
const CARRIED = /^[\x20-\x7e]*$/;

/** The key that requests carry; empty: none. It lasts as long as the tab. */
export const key = signal(sessionStorage.getItem(KEY) ?? "");
/** Whether the server has refused the key, or wants one. */
export const needsKey = signal(!CARRIED.test(key.value));

export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {number} status 0: the server did not answer.
   * @param {string} code
   */
  constructor(message, status, code = "") {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** @param {string} value */
export function useKey(value) {
  key.value = value.trim();
  sessionStorage.setItem(KEY, key.value);
  needsKey.value = !CARRIED.test(key.value);
}

/** @returns {Record<string, string>} */
function headers() {
  const found = { "Content-Type": "application/json" };
  return key.value ? { ...found, Authorization: `Bearer ${key.value}` } : found;
}

/**
 * @param {Response} answer
 * @returns {Promise<ApiError>}
 */
async function refusal(answer) {
  if (answer.status === 401) needsKey.value = true;
  const body = await answer.json().catch(() => null);
  const error = body?.error ?? {};
  return new ApiError(error.message ?? `The server answered ${answer.status}.`, answer.status, error.code);
}

/**
 * @param {string} method
 * @param {string} path
 * @param {unknown} [body]
 * @returns {Promise<any>}
 */
export async function call(method, path, body) {
  const text = body === undefined ? undefined : JSON.stringify(body);
  /** @type {Response} */
  let answer;
  try {
    answer = await fetch(path, { method, headers: headers(), body: text });
  } catch {
    throw new ApiError(UNREACHED, 0);
  }
  if (!answer.ok) throw await refusal(answer);
  return answer.json();
}

/**
 * Call something that is streamed, and hand over each event until the last one.
 *
 * @param {string} path
 * @param {unknown} body
 * @param {(event: any) => void} onEvent
 * @param {AbortSignal} stop
 */
export async function stream(path, body, onEvent, stop) {
  let isOpen = false;
  await fetchEventSource(path, {
    method: "POST",
    headers: headers(),
    body: JSON.stringify(body),
    signal: stop,
    openWhenHidden: true,
    async onopen(answer) {
      if (!answer.ok) throw await refusal(answer);
      isOpen = true;
    },
    onmessage(message) {
      if (message.data && message.data !== "[DONE]") onEvent(JSON.parse(message.data));
    },
    onerror(error) {
      // Thrown, so that a reply is not asked for a second time.
      throw error instanceof ApiError
        ? error
        : new ApiError(isOpen ? "The connection was lost during the reply." : UNREACHED, 0);
    },
  });
}

/**
 * Listen to what happens, over lost connections, until `stop`.
 *
 * @param {string} path
 * @param {string} after The id of an event, behind which it goes on; empty: from now on.
 * @param {(event: any, id: string) => void} onEvent A null event only says behind which id one is.
 * @param {(isOpen: boolean) => void} onState
 * @param {AbortSignal} stop
 */
export async function listen(path, after, onEvent, onState, stop) {
  let waits = 500;
  await fetchEventSource(path, {
    headers: after ? { ...headers(), "last-event-id": after } : headers(),
    signal: stop,
    openWhenHidden: true,
    async onopen(answer) {
      if (!answer.ok) throw await refusal(answer);
      waits = 500;
      onState(true);
    },
    onmessage(message) {
      onEvent(message.data ? JSON.parse(message.data) : null, message.id);
    },
    onclose() {
      throw new Error("closed"); // it is asked again, after the last event that was seen
    },
    onerror(error) {
      onState(false);
      if (error instanceof ApiError && [401, 404].includes(error.status)) throw error;
      waits = Math.min(2 * waits, 10_000);
      return waits;
    },
  });
}
