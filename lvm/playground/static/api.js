// What the page asks its server. Every failure becomes an Error whose message can be shown.

async function checked(answer) {
  if (answer.ok) return answer;
  let message = `the server answered ${answer.status}`;
  try { message = (await answer.json()).error || message; } catch { /* no JSON: keep the status */ }
  throw new Error(message);
}

async function ask(path, options) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server cannot be reached; is it still running where it was started?");
  }
  return checked(answer);
}

export const imageUrl = id => `/api/images/${id}.png`;
export const about = async () => (await ask("/api/about")).json();
export const recall = async id => (await ask(`/api/prompts/${id}`)).json();

// Sends one picture file; returns its id.
export async function upload(file, limits) {
  if (file.size > limits.most_bytes) { // a server that refuses half of a body is a reset to browsers
    const most = Math.round(limits.most_bytes / 2 ** 20);
    throw new Error(`${file.name} is larger than ${most} MiB, the most that is taken; make it smaller first`);
  }
  const path = `/api/images?name=${encodeURIComponent(file.name)}`;
  return (await (await ask(path, { method: "POST", body: file })).json()).id;
}

// Asks for answers and hands each event to `each` as it arrives; aborting `signal` cancels the work.
export async function answers(asked, each, signal) {
  const answer = await ask("/api/answers", {
    method: "POST", body: JSON.stringify(asked), headers: { "content-type": "application/json" }, signal,
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", last = null;
  for (;;) {
    let chunk;
    try {
      chunk = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("the connection to the server broke; ask again");
    }
    if (chunk.done) break;
    const lines = (rest + chunk.value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      last = JSON.parse(line);
      if (last.event === "error") throw new Error(last.error);
      each(last);
    }
  }
  if (last?.event !== "done") throw new Error("the server stopped before the answers were finished; ask again");
}
