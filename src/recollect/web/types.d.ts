/** What the public API sends, as far as the page reads it, and what the page makes of it. */

export type Role = "system" | "user" | "assistant" | "tool";
export type Warmth = "memory" | "disk" | "none";

export interface Part {
  type: string;
  text?: string;
}

export interface Item {
  id: string;
  type: "message" | "reasoning" | "function_call" | "function_call_output";
  role?: Role;
  content?: Part[];
  name?: string;
  arguments?: string;
  call_id?: string;
  output?: string;
}

export interface Usage {
  prompt_tokens: number;
  reused_tokens: number;
  restored_tokens: number;
  computed_tokens: number;
  read_ahead_tokens: number;
  generated_tokens: number;
  drafted_tokens: number;
  accepted_tokens: number;
  ttft_s: number;
  prefill_tps: number | null;
  decode_tps: number | null;
  reason: string;
  difference: string | null;
  lost_tokens: number;
  sampling: Record<string, number> | null;
}

export interface GoingOn {
  tokens: number;
  in_memory: number;
  on_disk: number;
  to_compute: number;
  seconds: number | null;
}

export interface ApiNode {
  id: string;
  role: Role;
  items: Item[];
  parent_id: string | null;
  response_id: string | null;
  created_at: number;
  usage?: Usage | null;
  finish_reason?: string | null;
  going_on?: GoingOn | null;
  warmth?: Warmth;
}

export interface ApiTree {
  id: string;
  nodes: ApiNode[];
  tips: Record<string, string | null>;
  checkpoints: Record<string, string | null>;
  has_more?: boolean;
  last_id?: string | null;
}

export interface Call {
  id: string;
  name: string;
  arguments: string;
}

/** A message in the tree, with what is drawn of it. */
export interface TreeNode {
  id: string;
  role: Role;
  parent: string | null;
  children: string[];
  depth: number;
  text: string;
  reasoning: string;
  calls: Call[];
  /** The ids of its items; a reply that calls several tools has several. */
  items: string[];
  responseId: string | null;
  createdAt: number;
  usage: Usage | null;
  finishReason: string | null;
  goingOn: GoingOn | null;
  warmth: Warmth;
  /** Whether it is being said now, and not kept yet. */
  isSprout?: boolean;
}

export interface Tree {
  id: string;
  nodes: Map<string, TreeNode>;
  roots: string[];
  tips: Record<string, string | null>;
  checkpoints: Record<string, string | null>;
  /** The names of branches, and of checkpoints, by the node at which they stand. */
  branchesBy: Map<string | null, string[]>;
  checkpointsBy: Map<string | null, string[]>;
}

/** Where a node is drawn, in the tree's own units. */
export interface Place {
  node: TreeNode;
  x: number;
  y: number;
  /** How many messages are folded away below it. */
  hidden: number;
}

export interface Conversation {
  id: string;
  created_at: number;
  metadata: Record<string, string>;
  name?: string;
  turns?: number;
}

/** A reply that is being generated, asked for here or elsewhere. */
export interface Pending {
  id: string;
  conversation: string;
  parent: string | null;
  branch: string;
  /** What was asked with it, where its message is not in the tree yet. */
  question: string | null;
  text: string;
  reasoning: string;
  computed: number;
  tokens: number;
  isOwn: boolean;
  stop: (() => void) | null;
}

export interface Settings {
  model: string;
  system: string;
  temperature: string;
  top_p: string;
  max_output_tokens: string;
  seed: string;
  tools: string;
}

export interface Notice {
  kind: "info" | "error";
  text: string;
}
